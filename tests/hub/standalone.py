"""Loads an exported folder with torch and transformers alone, and writes down what came of it.

Run by itself, in whatever environment is to be tried: python -I standalone.py FOLDER WORK [DTYPE]. `retrofit` cannot be
imported in it. The folder is also loaded by a Hub id, from a cache as the Hub's client makes it. WORK gets
outputs.safetensors, and `again`, the folder as transformers saves it; the last line of stdout is a JSON record.
Whoever compares takes inputs and `outputs` from here.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

PROMPTS = [[97, 98, 99], []]
SETTINGS = {"steps": 8, "seed": 5, "max_length": 24}


def inputs() -> dict[str, Any]:
    import torch

    return {
        "input_ids": torch.tensor([[97, 98, 258, 100], [258, 98, 99, 257]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "timesteps": torch.tensor([0.3, 0.7], dtype=torch.float64),
        "kept": torch.tensor([[True, False, False, False]] * 2),
    }


def outputs(model: Any) -> dict[str, Any]:
    """Logits, expected gaps and samples of a FlexMDM; of a plain LLaDA the logits."""
    import torch

    given = inputs()
    if model.config.model_type == "llada":
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**given)
    found = {"logits": out.logits.float().contiguous()}
    if model.config.model_type == "flexmdm":
        found["expected_gaps"] = out.expected_gaps.contiguous()
        for number, sample in enumerate(model.generate(PROMPTS, **SETTINGS)):
            found[f"sample {number}"] = torch.tensor(sample.token_ids)
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    import torch

    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def gradients(model: Any) -> dict[str, Any]:
    """Of a sum of outputs, in training mode, by parameter name."""
    model.train().zero_grad()
    given = inputs() if model.config.model_type == "flexmdm" else {"input_ids": inputs()["input_ids"]}
    out = model(**given)
    loss = out.logits.float().pow(2).mean()
    if model.config.model_type == "flexmdm":
        loss = loss + out.expected_gaps.sum()
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.eval()
    return found


def main(folder: str, work: str, dtype: str = "float32") -> None:
    sys.modules["retrofit"] = None  # type: ignore[assignment]
    os.environ |= {"HF_HOME": work, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    cache = Path(work, "hub", "models--some--flexmdm")
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
    import torch
    import transformers
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

    torch.set_num_threads(1)
    record: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "dtype": dtype}
    # transformers 4 calls the argument torch_dtype until 4.56, and its default is float32
    options = {"trust_remote_code": True, "dtype": getattr(torch, dtype)}
    model = AutoModel.from_pretrained(folder, **options).eval()
    record["code"] = type(model).__module__.split(".")[0]
    assert next(model.parameters()).dtype == options["dtype"]
    expected = outputs(model)
    save_file(expected, f"{work}/outputs.safetensors")

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    record["tokenizer"] = tokenizer.decode(tokenizer("Ann has", add_special_tokens=False)["input_ids"]) == "Ann has"
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    record["config"] = config.to_dict() | {"dtype": dtype} == model.config.to_dict() | {"dtype": dtype}
    others = [AutoModelForMaskedLM] + [AutoModelForCausalLM] * (model.config.model_type == "llada")
    for auto_class in others:
        other = auto_class.from_pretrained(folder, **options).eval()
        record[auto_class.__name__] = same(outputs(other), expected)
        del other
    by_id = AutoModel.from_pretrained("some/flexmdm", **options).eval()
    record["hub_id"] = same(outputs(by_id), expected)
    del by_id

    for name, more in (("device_map", {"device_map": "auto"}), ("low_cpu_mem_usage", {"low_cpu_mem_usage": True})):
        other = AutoModel.from_pretrained(folder, **options, **more).eval()
        record[name] = same(outputs(other), expected)
        del other
    with torch.device("meta"):
        shape = AutoModel.from_config(config, trust_remote_code=True)
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    record["meta"] = all(parameter.is_meta for parameter in shape.parameters()) and names == {
        name: parameter.shape for name, parameter in shape.named_parameters()
    }

    plain = gradients(model)
    model.gradient_checkpointing_enable()
    record["gradient_checkpointing"] = len(plain) > 0 and same(gradients(model), plain)
    model.gradient_checkpointing_disable()

    again, twice = Path(work, "again"), Path(work, "twice")
    model.save_pretrained(again)
    reloaded = AutoModel.from_pretrained(again, **options).eval()
    record["saved_again"] = same(outputs(reloaded), expected)
    reloaded.save_pretrained(twice)
    files = sorted(path.name for path in again.iterdir() if path.is_file())
    record["saved_twice"] = files == sorted(path.name for path in twice.iterdir() if path.is_file()) and all(
        (again / name).read_bytes() == (twice / name).read_bytes() for name in files
    )
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
