"""The checkpoints of the published FlexMDM code (arXiv 2509.01025) made ours.

They are one state dict of torch.save, or safetensors, under that code's names: PEFT's or merged, `temb_mod` in every
block for what a group of blocks shares, `time_mlp`, `scalar_length_head`. They say nothing of configuration, tokenizer
or schedule: the first two are the base model's, and the last has to be told.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.weights import TensorFiles, Weights, weight_files, write_files
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.llada import refuse_misfits

from .whole import refuse_existing, write_whole

PAPER_GROUP = 8
"""Blocks that share an AdaLN linear in the paper's runs."""

_SHARD_BYTES = 5 * 10**9

_WRAPPERS = re.compile(r"^(module\.|backbone\.|base_model\.model\.)+")
_FACTOR = re.compile(r"\.lora_([AB])(\.default)?\.weight$")
_MODULATION = re.compile(r"model\.transformer\.blocks\.(\d+)\.temb_mod\.(weight|bias)")
_RENAMED = {
    "scalar_length_head.norm.": "insertion_head.norm.",
    "scalar_length_head.proj1.": "insertion_head.hidden.",
    "scalar_length_head.proj2.": "insertion_head.output.",
    "time_mlp.0.": "time_conditioning.hidden.",
    "time_mlp.2.": "time_conditioning.output.",
}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Published:
    """What a published checkpoint holds, by our names.

    Attributes:
        plain: parameter -> whatever is no LoRA factor and no modulation.
        factors: weight that is adapted -> A and B.
        modulations: (block, "weight" or "bias") -> a block's own copy.
    """

    plain: dict[str, Stored]
    factors: dict[str, dict[str, Stored]]
    modulations: dict[tuple[int, str], Stored]


def import_reference(
    source: Path,
    dest: Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    insertion_schedule: str = "geometric",
    lora_alpha: float | None = None,
    max_gap: float = 1024.0,
) -> str:
    """Writes a published checkpoint as a directory in our layout, LoRA merged into the weights.

    A checkpoint without time conditioning and length head becomes a plain LLaDA.

    Args:
        source: a .bin or .safetensors file, or a directory that holds such files.
        dest: appears when it is complete; must not exist.
        base: directory or Hub id of the LLaDA that was fine-tuned, for config.json and tokenizer, and for the weights
            that the checkpoint lacks. None: `source` is a directory with a config.json of its own.
        insertion_schedule: "geometric" (what the published training code draws from) or "linear".
        lora_alpha: None: equal to the rank, as the paper's.
        max_gap: what the head's softplus is multiplied by, the length of the published canvas.

    Returns:
        one line that says what was written.

    Raises:
        ValueError: a file is not readable, holds more than tensors, or its tensors are not those of the model (named).
    """
    refuse_existing(dest)
    published = read_published(source)
    origin = _origin(source, base, revision)
    config = loading.model_config(origin)
    if published.modulations or any(name.startswith("insertion_head.") for name in published.plain):
        values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        config = FlexMDMConfig(
            **values,
            insertion_schedule={"type": insertion_schedule},
            unmasking_schedule={"type": "linear"},
            time_input="t",
            time_scale=1.0,
            time_hidden_size=_hidden_size(published),
            time_group_size=group_size(published.modulations, config.n_layers),
            insertion_head_form="softplus",
            max_gap=max_gap,
            token_flags=False,
            base_model=origin.name if origin.revision else Path(origin.name).name,  # no local path travels
            base_revision=origin.revision,
        )
    weights = _weights(source, config, published, origin, lora_alpha)
    config.dtype = weights.dtypes["model.transformer.wte.weight"]  # the base's may be of another

    def write(directory: Path) -> None:
        config.save_pretrained(directory)
        write_whole(directory, weights, _SHARD_BYTES)
        write_files(directory, dict(loading.tokenizer_files(origin)))

    checkpoint.write_directory(dest, write)
    what = f"a FlexMDM, insertion schedule {insertion_schedule}" if isinstance(config, FlexMDMConfig) else "a LLaDA"
    count = sum(shape.numel() for shape in weights.shapes.values())
    return f"{dest}: {what}, {count:,} parameters, {len(published.factors)} LoRA products merged"


def read_published(source: Path) -> Published:
    """The tensors of a published checkpoint by our names; values are read when they are asked for.

    Raises:
        ValueError: see `import_reference`.
    """
    plain: dict[str, Stored] = {}
    factors: dict[str, dict[str, Stored]] = {}
    modulations: dict[tuple[int, str], Stored] = {}
    for key, stored in _tensors(source).items():
        name = _WRAPPERS.sub("", key).replace(".base_layer.", ".")
        if name.startswith("transformer."):
            name = f"model.{name}"
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        factor, modulation = _FACTOR.search(name), _MODULATION.fullmatch(name)
        if factor:
            factors.setdefault(name[: factor.start()] + ".weight", {})[factor[1]] = stored
        elif modulation:
            modulations[int(modulation[1]), modulation[2]] = stored
        elif name in plain:
            raise ValueError(f"{source}: {key} stands there twice, under two prefixes; keep one of them")
        else:
            plain[name] = stored
    for weight, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{source}: {weight} has lora_{' '.join(pair)} and not the other factor")
    return Published(plain, factors, modulations)


def group_size(modulations: Mapping[tuple[int, str], Stored], layers: int) -> int:
    """How many blocks share an AdaLN linear: the paper's 8 if that fits what the blocks hold, else the most that does.

    Args:
        modulations: of every block, or of the first of each group.

    Raises:
        ValueError: no size fits.
    """
    blocks = sorted({block for block, _ in modulations})
    values = {block: modulations[block, "weight"].read() for block in blocks if (block, "weight") in modulations}
    for size in (PAPER_GROUP, *range(layers, 0, -1)):
        complete = blocks in (list(range(0, layers, size)), list(range(layers)))
        if complete and all(torch.equal(values[block], values[block - block % size]) for block in values):
            return size
    raise ValueError(f"temb_mod is there for blocks {blocks}: no grouping of {layers} blocks fits")


def _tensors(source: Path) -> dict[str, Stored]:
    """All tensors, by the names in the files."""
    paths = [source]
    if source.is_dir():
        paths = sorted(source.glob("*.safetensors")) or sorted(source.glob("*.bin"))
    if not paths or not paths[0].exists():
        raise ValueError(f"{source}: no .safetensors and no .bin file there")
    if paths[0].suffix == ".safetensors":
        return _in_safetensors(paths)
    return {
        name: Stored(tuple(tensor.shape), tensor.dtype, partial(tensor.clone, memory_format=torch.contiguous_format))
        for path in paths
        for name, tensor in _unpickled_tensors(path).items()
    }


def _in_safetensors(paths: list[Path]) -> dict[str, Stored]:
    files = TensorFiles(paths)
    return {name: Stored(shape, files.dtypes[name], partial(files.read, name)) for name, shape in files.shapes.items()}


def _unpickled_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict of torch.save, mapped rather than read, by the reader that makes nothing but tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{path}: holds more than tensors, or is no file of torch.save ({reason}); save its state dict alone"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: is no state dict (name -> tensor); save its state dict alone")
    return {str(name): tensor for name, tensor in content.items()}


def _origin(source: Path, base: str | None, revision: str | None) -> loading.Source:
    """The plain LLaDA that was fine-tuned."""
    if base is None and not (source / "config.json").is_file():
        raise ValueError(f"{source}: has no config.json beside it; name the LLaDA that was fine-tuned with --base")
    origin = loading.resolve(base or source, revision)
    if origin.kind != "full" or isinstance(loading.model_config(origin), FlexMDMConfig):
        raise ValueError(f"{origin.name}: --base has to be a plain LLaDA")
    return origin


def _hidden_size(published: Published) -> int | None:
    bias = published.plain.get("time_conditioning.hidden.bias")
    return None if bias is None else bias.shape[0]


def _weights(
    source: Path, config: LLaDAConfig, published: Published, origin: loading.Source, lora_alpha: float | None
) -> Weights:
    """All parameters of the model, LoRA merged, each in the dtype that it is stored in."""
    found = dict(published.plain)
    if isinstance(config, FlexMDMConfig):
        for (block, part), stored in published.modulations.items():
            if block % config.time_group_size == 0:
                found[f"time_conditioning.modulations.{block // config.time_group_size}.{part}"] = stored
    if not any(name.startswith("model.transformer.") for name in found):
        found |= _in_safetensors(weight_files(origin.directory))
    model = loading.on_meta(config, torch.float32)
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    refuse_misfits(
        source,
        type(model).__name__,
        missing=ours.keys() - found.keys(),
        surplus={*found.keys() - ours.keys(), *published.factors.keys() - found.keys()},
        misshapen=[
            *(
                f"{n} {list(found[n].shape)} for {list(s)}"
                for n, s in ours.items()
                if n in found and found[n].shape != s
            ),
            *(f"factors of {n}" for n, pair in published.factors.items() if n in ours and not _fit(pair, ours[n])),
        ],
    )
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(found[name].dtype)
    readers = {name: stored.read for name, stored in found.items()}
    readers |= {name: partial(_merge, found[name], pair, lora_alpha) for name, pair in published.factors.items()}
    return Weights(model, readers)


def _fit(pair: Mapping[str, Stored], shape: tuple[int, ...]) -> bool:
    """Whether A [r, n] and B [m, r] make an update of W [m, n]."""
    return pair["B"].shape[:1] + pair["A"].shape[1:] == shape and pair["B"].shape[1:] == pair["A"].shape[:1]


def _merge(weight: Stored, pair: Mapping[str, Stored], lora_alpha: float | None) -> Tensor:
    scaling = 1.0 if lora_alpha is None else lora_alpha / pair["A"].shape[0]
    return adapters.merge(weight.read(), pair["A"].read(), pair["B"].read(), scaling, weight.dtype)
