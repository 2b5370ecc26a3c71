"""LoRA by PEFT: injecting factors, saving and loading an ordinary PEFT directory, merging.

`inject_adapter_in_model` is used rather than `get_peft_model`, which would keep a frozen twin of every new module
(1.1 GB at 8B). The directory written is nevertheless what plain PEFT expects: the new modules are listed as
`modules_to_save`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from retrofit.flexmdm.modeling import NEW_MODULES

from .weights import Files, Readers, TensorFiles

HEAD = "model.transformer.ff_out"
"""The LM head's path. Each block has a linear map of the same last name, so the head is always named in full."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_NAME = "default"  # PEFT's own name for the only adapter of a model
_PREFIX = "base_model.model."  # what PEFT puts before the names of the base model's modules


@dataclass(frozen=True)
class AdapterSettings:
    """Shape of the factors. The update of a target's weight is `lora_alpha / r * B @ A`.

    Attributes:
        target_modules: names as the user gave them. A name without dots stands for the linear map of that name in every
            block; a full path for one module.
        rank_pattern, alpha_pattern: other ranks and alphas of some targets, as PEFT has them (adapters made elsewhere).
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def difference(self, other: AdapterSettings) -> str | None:
        """What keeps factors of this shape from being continued as the other, or None. Dropout is free to differ."""
        for name in ("r", "lora_alpha"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {getattr(self, name):g} and {getattr(other, name):g}"
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name) != getattr(other, name):
                return f"{name} is {dict(getattr(self, name))} and {dict(getattr(other, name))}"
        if set(self.target_modules) != set(other.target_modules):
            return f"target_modules are {sorted(self.target_modules)} and {sorted(other.target_modules)}"
        return None


def find_targets(model: nn.Module, targets: Iterable[str]) -> list[str]:
    """Full paths of the modules that the names stand for.

    Raises:
        ValueError: a name matches no linear map (the nearest one is named), or the head is asked for and is tied.
    """
    linears = [
        name for name, module in model.named_modules() if name.startswith("model.") and isinstance(module, nn.Linear)
    ]
    block_names = sorted({name.rpartition(".")[2] for name in linears if ".blocks." in name})
    found: list[str] = []
    for target in targets:
        matches = [
            name for name in linears if name == target or (".blocks." in name and name.rpartition(".")[2] == target)
        ]
        if not matches and target == HEAD:
            raise ValueError(
                f"lora.target_modules: {HEAD} is tied to the embedding in this model and takes no LoRA; "
                "remove it, or untie the model first"
            )
        if not matches:
            nearest = _nearest(target, [*block_names, HEAD])
            raise ValueError(f"lora.target_modules: {target} matches no module of the model; nearest: {nearest}")
        found += [name for name in matches if name not in found]
    return found


_KNOWN_ELSEWHERE = {
    "o_proj": "attn_out", "out_proj": "attn_out", "gate_proj": "ff_proj", "down_proj": "ff_out", "lm_head": HEAD,
}  # fmt: skip


def _nearest(target: str, candidates: list[str]) -> str:
    """LLaDA's name for what other models call `target`, else the most alike."""
    last = target.rpartition(".")[2]
    if last in _KNOWN_ELSEWHERE:
        return _KNOWN_ELSEWHERE[last]
    return max(candidates, key=lambda name: difflib.SequenceMatcher(None, last, name.rpartition(".")[2]).ratio())


def inject(model: nn.Module, settings: AdapterSettings) -> None:
    """Puts fresh factors on the targets, in place.

    On a model on the meta device they are there too, and nothing is drawn; otherwise A is PEFT's Kaiming draw from the
    global generator, and B zero.
    """
    from peft import LoraConfig, inject_adapter_in_model

    expected = find_targets(model, settings.target_modules)
    on_meta = next(model.parameters()).is_meta
    config = LoraConfig(**_peft_fields(settings))
    inject_adapter_in_model(config, model, adapter_name=_NAME, low_cpu_mem_usage=on_meta)
    layers = dict(lora_layers(model))
    if sorted(layers) != sorted(expected):
        raise RuntimeError(f"PEFT adapted {len(layers)} modules where {len(expected)} were meant")
    for name, layer in layers.items():
        layer.lora_variant[_NAME] = _Product(in_place=name == HEAD)


@dataclass(frozen=True)
class _Product:
    """How PEFT is to add the factors' product: x W' + (s A(dropout x)) B', in one operation.

    PEFT's own form holds three tensors of the result's size at once, and its backward two; this holds two and one, or
    one and one. It scales the r columns of A's product, not all of B's. Under ZeRO-3 the layer gathers B as a parameter
    of its own.

    Attributes:
        in_place: add to the base's result itself. Not in a block, where selective checkpointing keeps that result.
    """

    in_place: bool

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """[T, n] -> [T, m]; `result` [T, m] is the base's alone, x in the factors' dtype."""
        a, b = module.lora_A[active_adapter], module.lora_B[active_adapter].weight
        thin = a(module.lora_dropout[active_adapter](x)) * module.scaling[active_adapter]
        add = result.addmm_ if self.in_place else result.addmm
        return add(thin.to(result.dtype), b.to(result.dtype).t())

    @staticmethod
    def supports_lora_conversion() -> bool:
        return False

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """For PEFT's merging in memory, as the two below are: the weight with the product added."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def _peft_fields(settings: AdapterSettings) -> dict[str, Any]:
    """LoraConfig's fields. By PEFT's rule of suffixes a bare `ff_out` would hit the head too: it is excluded then."""
    has_head = HEAD in settings.target_modules
    return {
        "r": settings.r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(settings.target_modules),
        "exclude_modules": [HEAD] if HEAD.rpartition(".")[2] in settings.target_modules and not has_head else None,
        "bias": "none",
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
    }


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(path, layer) of every adapted module."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def is_adapted(model: nn.Module) -> bool:
    return any(True for _ in lora_layers(model))


def select_trainable(model: nn.Module) -> None:
    """Freezes all but factors and new modules of an adapted model (of any other, nothing); trainables become float32.

    bfloat16 weights under AdamW lose nearly every update of a usual learning rate: trainables are never kept in it.
    """
    adapted = is_adapted(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not adapted or is_factor(name) or name.split(".")[0] in NEW_MODULES)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def set_dropout(layer: Any, probability: float) -> None:
    """Gives an adapted layer another dropout, which is no part of an adapter's shape."""
    layer.lora_dropout[_NAME] = nn.Dropout(probability) if probability else nn.Identity()


def is_factor(name: str) -> bool:
    """Whether the parameter is a LoRA factor."""
    return ".lora_A." in name or ".lora_B." in name


def plain_name(name: str) -> str:
    """The name that the parameter has in a model without factors."""
    return name.replace(".base_layer.", ".")


def draw_factors(layer: nn.Module) -> None:
    """Initialises an adapted layer's factors: PEFT's Kaiming draw from the global generator for A, zeros for B."""
    cast(Any, layer).reset_lora_parameters(_NAME, True)


# ------------------------------------------------------------------------------------------------------------ directory


def _file_key(name: str) -> str:
    """The key in an adapter file of the model's parameter `name`."""
    return _PREFIX + name.replace(f".{_NAME}.", ".") if is_factor(name) else _PREFIX + name


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that an adapter directory holds: factors and new modules."""
    return [name for name, _ in model.named_parameters() if is_factor(name) or name.split(".")[0] in NEW_MODULES]


def adapter_files(
    weights: Mapping[str, Tensor], settings: AdapterSettings, *, base_model: str, base_revision: str | None
) -> Files:
    """The files of an ordinary PEFT directory.

    Args:
        weights: the model's parameter name -> tensor, of all factors and new modules (see `adapter_names`).
        base_model: local path or Hub id from which plain PEFT users load the base.
    """
    modules_to_save = [module for module in NEW_MODULES if any(name.split(".")[0] == module for name in weights)]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "revision": base_revision,
        "inference_mode": True,
        "modules_to_save": modules_to_save or None,
        **_peft_fields(settings),
    }
    return {
        CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode(),
        WEIGHTS_FILE: {_file_key(name): tensor for name, tensor in weights.items()},
    }


def read_adapter_config(directory: Path) -> tuple[AdapterSettings, str | None, str | None]:
    """(shape, base model, base revision) of a PEFT directory.

    Raises:
        ValueError: not a LoRA configuration, or one with features that are not supported (named).
    """
    path = directory / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["target_modules"], list):
            raise ValueError(f"target_modules must be a list of names, found {config['target_modules']!r}")
        settings = AdapterSettings(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout") or 0.0,
            target_modules=tuple(config["target_modules"]),
            rank_pattern=dict(config.get("rank_pattern") or {}),
            alpha_pattern=dict(config.get("alpha_pattern") or {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a LoRA configuration of PEFT ({error})") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    unsupported = ("use_dora", "use_rslora", "layers_to_transform", "lora_bias")
    for name in unsupported:
        if config.get(name):
            raise ValueError(f"{path}: {name} is set, which is not supported; merge the adapter with PEFT first")
    return settings, config.get("base_model_name_or_path"), config.get("revision")


def adapter_readers(model: nn.Module, directory: Path) -> Readers:
    """Readers of a model's factors and new modules from an adapter.

    Args:
        model: with its factors injected.

    Raises:
        ValueError: the file is not readable, or a key is unmatched, missing or misshapen (count and first names).
    """
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise ValueError(f"{directory}: {WEIGHTS_FILE} is missing (incomplete download?)")
    ours = {_file_key(name): name for name in adapter_names(model)}
    file = TensorFiles([path])
    keys = file.shapes.keys()
    problems = {
        "unmatched": sorted(keys - ours.keys()),
        "missing": sorted(ours.keys() - keys),
        "misshapen": [
            key for key in sorted(keys & ours.keys()) if file.shapes[key] != model.get_parameter(ours[key]).shape
        ],
    }
    if any(problems.values()):
        raise ValueError(f"{path}: the adapter does not fit its base: {_describe(problems)}")
    return {name: partial(file.read, key) for key, name in ours.items()}


def _describe(problems: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, keys in problems.items():
        if keys:
            parts.append(f"{len(keys)} {kind} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    return ", ".join(parts)


_BLOCK = 16 << 20  # float32 numbers of a product in memory: an LM head of 8B has 518 million


def merge(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """W + lora_alpha / r * B @ A, taken in float32 and rounded once to `dtype`: in W's place, if that is W's own."""
    a, b = a.float(), b.float()
    result = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    rows = max(1, _BLOCK // weight.shape[1])
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        result[block] = (b[block] @ a).mul_(scaling).add_(weight[block])
    return result


def merged_readers(model: nn.Module, readers: Readers, *, as_read: bool = False) -> Readers:
    """Readers, by plain names, of what `merge_into_base` would make of an adapted model.

    Args:
        readers: by plain names; of the factors by theirs.
        as_read: add to the base's weights as they are read. Otherwise they are rounded to the model's dtype before, as
            they are in a model, and once more after.
    """

    def read(name: str, dtype: torch.dtype, scaling: float) -> Tensor:
        a, b = (readers[f"{name}.{factor}.{_NAME}.weight"]() for factor in ("lora_A", "lora_B"))
        weight = readers[f"{name}.weight"]()
        return merge(weight if as_read else weight.to(dtype), a, b, scaling, dtype)

    kept = {name: read for name, read in readers.items() if not is_factor(name)}
    return kept | {
        f"{name}.weight": partial(read, name, layer.get_base_layer().weight.dtype, layer.scaling[_NAME])
        for name, layer in lora_layers(model)
    }


def merge_into_base(model: nn.Module) -> None:
    """Adds every factor product to its base weight (see `merge`) and removes the factors, in place.

    On the meta device only the shape of the model changes.
    """
    for name, layer in list(lora_layers(model)):
        base = layer.get_base_layer()
        a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        with torch.no_grad():
            merge(base.weight, a, b, layer.scaling[_NAME], base.weight.dtype)
        base.weight.requires_grad_(True)
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = base  # a ModuleDict's children are no attributes
    if hasattr(model, "peft_config"):
        del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False  # type: ignore[assignment]
