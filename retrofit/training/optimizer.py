"""AdamW's parameter groups, the learning-rate schedule, and the optimizer's state by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from retrofit.checkpoints.adapters import is_factor
from retrofit.flexmdm.modeling import NEW_MODULES
from retrofit.sections import OptimizerSection

NamedParameters = list[tuple[str, nn.Parameter]]
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps for each parameter, by torch's names."""


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


def decayed_names(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters that decay. To be asked of a whole model: ZeRO-3 flattens its parameters."""
    return frozenset(name for name, parameter in trainable_parameters(model) if has_weight_decay(name, parameter))


def build_optimizer(parameters: NamedParameters, decayed: frozenset[str], section: OptimizerSection) -> AdamW:
    """AdamW with up to four groups: backbone or new modules, with or without weight decay (see `decayed_names`)."""
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in parameters:
        is_new = name.split(".")[0] in NEW_MODULES
        decays = name in decayed
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
        fused=True,  # one pass over memory for each tensor, on a CPU too
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


def total_norm(parameters: NamedParameters) -> Tensor:
    """Global 2-norm of the gradients (a DTensor where they are); RuntimeError if a trainable has none."""
    missing = [name for name, parameter in parameters if parameter.grad is None]
    if missing:
        raise RuntimeError(f"{len(missing)} trainable parameters have no gradient, {missing[0]} for one")
    return torch.nn.utils.get_total_norm([parameter.grad for _, parameter in parameters])  # type: ignore[misc]


def clip_gradients(parameters: NamedParameters, norm: float, max_norm: float | None) -> None:
    """Scales gradients whose global norm is `norm` down to `max_norm`, in place."""
    if max_norm is not None:
        device = parameters[0][1].device
        torch.nn.utils.clip_grads_with_norm_([p for _, p in parameters], max_norm, torch.tensor(norm, device=device))
