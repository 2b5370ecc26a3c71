"""AdamW's parameter groups, the learning-rate schedule, and the optimizer's state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from retrofit.checkpoints.adapters import is_factor
from retrofit.flexmdm.modeling import NEW_MODULES
from retrofit.sections import OptimizerSection

NamedParameters = list[tuple[str, nn.Parameter]]
STATE_KINDS = ("master", "exp_avg", "exp_avg_sq")


def trainable_parameters(model: nn.Module) -> NamedParameters:
    """(name, parameter) of all trainable parameters, in the model's order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def has_weight_decay(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices that are neither LoRA factors nor embeddings.

    The paper decays all but the factors. Pulling norms' gains, biases and embeddings' rows to zero serves nothing, and
    with LoRA, the paper's case, the difference is the new modules' biases, their norm and the flag embedding.
    """
    is_embedding = name.endswith("wte.weight") or name.startswith("flag_embedding.")
    return parameter.ndim >= 2 and not is_factor(name) and not is_embedding


def build_optimizer(parameters: NamedParameters, section: OptimizerSection) -> AdamW:
    """AdamW with up to four groups: backbone or new modules, with or without weight decay."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters:
        is_new = name.split(".")[0] in NEW_MODULES
        decays = has_weight_decay(name, parameter)
        group = groups.setdefault(
            f"{'new' if is_new else 'backbone'}, {'decay' if decays else 'no decay'}",
            {
                "params": [],
                "lr": (section.new_modules_learning_rate if is_new else None) or section.learning_rate,
                "weight_decay": section.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return AdamW(
        [{"name": name, **group} for name, group in groups.items()],
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
    )


def learning_rate_factor(step: int, section: OptimizerSection, max_steps: int) -> float:
    """Factor on the peak rate of the update that ends step `step` (counted from 0).

    Rises linearly over ceil(warmup_ratio * max_steps) steps, the first of them already above 0, then falls once, to
    min_lr_ratio at max_steps, and stays there: it never comes back up.
    """
    warmup = math.ceil(section.warmup_ratio * max_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[section.lr_scheduler_type]
    return section.min_lr_ratio + (1 - section.min_lr_ratio) * remaining


def build_scheduler(optimizer: Optimizer, section: OptimizerSection, max_steps: int) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, section, max_steps))


def restore_scheduler(scheduler: LambdaLR, state: Mapping[str, Any]) -> None:
    """Sets the scheduler and the optimizer's rates: LambdaLR's own loading leaves the rates as they were."""
    scheduler.load_state_dict(dict(state))
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = rate


def export_state(optimizer: Optimizer, parameters: NamedParameters) -> tuple[dict[str, Tensor], int]:
    """(`master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>` -> float32 on the CPU, Adam's step count)."""
    tensors: dict[str, Tensor] = {}
    step = 0
    for name, parameter in parameters:
        state = optimizer.state.get(parameter, {})
        tensors[f"master/{name}"] = _copy(parameter)
        for kind in STATE_KINDS[1:]:
            tensors[f"{kind}/{name}"] = _copy(state[kind]) if state else torch.zeros(parameter.shape)
        step = int(state["step"]) if state else step
    return tensors, step


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


def import_state(optimizer: Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor], step: int) -> None:
    """Restores what `export_state` gave, creating Adam's state without a dummy update.

    Raises:
        ValueError: a tensor is missing, surplus or misshapen (count and first names).
    """
    check_names(parameters, tensors, STATE_KINDS)
    for name, parameter in parameters:
        with torch.no_grad():
            parameter.copy_(tensors[f"master/{name}"])
        if step:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{kind: tensors[f"{kind}/{name}"].to(parameter, copy=True) for kind in STATE_KINDS[1:]},
            }


def check_names(parameters: NamedParameters, tensors: Mapping[str, Tensor], kinds: Iterable[str]) -> None:
    """Refuses training state that is not exactly that of the given parameters (ValueError)."""
    kinds = tuple(kinds)
    shapes = {f"{kind}/{name}": tuple(parameter.shape) for kind in kinds for name, parameter in parameters}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items() if key.partition("/")[0] in kinds}
    wrong = sorted(key for key in shapes.keys() | found.keys() if shapes.get(key) != found.get(key))
    if wrong:
        raise ValueError(
            f"training_state.safetensors: {len(wrong)} tensors are missing, surplus or misshapen for this model: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; does the checkpoint belong to this recipe?"
        )
