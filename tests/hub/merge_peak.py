"""Peak memory of a merge. `prepare` writes a LLaDA with a large head and an adapter on it; python merge_peak.py WORK
merges them in a process of its own, since a peak cannot be set back.

The last line of stdout is a JSON record of bytes: the largest tensor, all that was written, and the peak resident
memory above what the imports took.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path

import torch

from retrofit.checkpoints import adapters, loading
from retrofit.checkpoints.weights import Weights, write_files, write_weights
from retrofit.flexmdm import LLaDAConfig

SETTINGS = adapters.AdapterSettings(8, 8.0, 0.0, ("q_proj", adapters.HEAD))


def prepare(root: Path) -> None:
    ids = {"mask_token_id": 5, "pad_token_id": 6, "eos_token_id": 6}
    sizes = {"vocab_size": 49152, "d_model": 1024, "n_layers": 1, "n_heads": 8, "mlp_hidden_size": 2048}
    config = LLaDAConfig(**sizes, **ids, max_sequence_length=64)
    config.dtype = torch.bfloat16
    model = loading.on_meta(config, torch.bfloat16)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    base = root / "base"
    base.mkdir()
    write_files(base, {"config.json": config.to_json_string().encode()})
    write_weights(base, Weights(model, {name: lambda s=shape: torch.full(s, 0.01) for name, shape in shapes.items()}))
    adapters.inject(model, SETTINGS)
    adapters.select_trainable(model)
    factors = {name: torch.full(model.get_parameter(name).shape, 0.1) for name in adapters.adapter_names(model)}
    (root / "adapter").mkdir()
    write_files(root / "adapter", adapters.adapter_files(factors, SETTINGS, base_model=str(base), base_revision=None))


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(root: Path) -> None:
    import peft.tuners.lora  # noqa: F401

    from retrofit.checkpoints.weights import TensorFiles
    from retrofit.hub.merge import merge

    imports = peak()
    merge(str(root / "adapter"), root / "merged", shard_size="150MB")
    above = peak() - imports
    files = TensorFiles(sorted((root / "merged").glob("*.safetensors")))
    sizes = [torch.Size(shape).numel() * 2 for shape in files.shapes.values()]
    print(json.dumps({"largest": max(sizes), "total": sum(sizes), "above_imports": above}))


if __name__ == "__main__":
    measure(Path(sys.argv[1]))
