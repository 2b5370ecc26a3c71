"""Resolves a DeepSpeed JSON against the recipe: what the recipe decides must be `auto`, absent or the same."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from retrofit.sections import Recipe

_THE_RECIPES = {
    "optimizer": "the recipe's section optimizer",
    "scheduler": "optimizer.lr_scheduler_type",
    "data_efficiency": "the recipe",
    "curriculum_learning": "the recipe",
    "tensorboard": "training.report_to",
    "wandb": "training.report_to",
    "comet": "training.report_to",
}

_PRECISION = ("bf16", "bfloat16", "fp16", "amp", "torch_autocast")

_NUMBERS = ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")

_PASSED_ON = (
    "activation_checkpointing", "aio", "comms_logger", "communication_data_type", "csv_monitor", "dump_state",
    "flops_profiler", "gradient_predivide_factor", "log_level", "memory_breakdown", "prescale_gradients",
    "steps_per_print", "timers", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
"""Parts that do not contradict the recipe; DeepSpeed ignores names that it does not know: others are refused."""

_OFFLOADING = ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param")

_UNSUPPORTED: dict[str, int | bool] = {
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "mics_shard_size": -1,
}
"""Settings of zero_optimization -> the value that leaves them off."""


def resolve(config: Mapping[str, Any], source: str, recipe: Recipe, world_size: int) -> dict[str, Any]:
    """A copy that `deepspeed.initialize` takes, with every `auto` filled in.

    Micro-batches follow the token budget and the loop marks where a step ends, so DeepSpeed's own accumulation is 1 and
    its batch sizes mean nothing. bf16 and fp16 stay off: `training.bf16` is autocast over float32 weights.

    Args:
        source: the file's name, for messages.

    Raises:
        ValueError: one line for each field that contradicts the recipe or cannot be had.
    """
    problems: list[str] = []

    def refuse(name: str, text: str) -> None:
        problems.append(f"{source}: {name}: {text}")

    def number(name: str, kind: type, right: float, why: str) -> None:
        value = config.get(name, "auto")
        what = "an integer" if kind is int else "a number"
        if value == "auto":
            return
        if isinstance(value, str):
            refuse(name, f'expected {what}, found the text "{value}"; write it without quotes, or "auto"')
        elif not _is_number(value) or (kind is int and not isinstance(value, int)):
            refuse(name, f'expected {what}, found {json.dumps(value)}; write "auto"')
        elif value != right:
            refuse(name, f'is {value}, but {why}; write "auto"')

    section = recipe.training
    norm = recipe.optimizer.max_grad_norm or 0.0
    stated = "null" if recipe.optimizer.max_grad_norm is None else norm
    number("gradient_clipping", float, norm, f"the recipe's optimizer.max_grad_norm is {stated}")
    number(
        "gradient_accumulation_steps", int, 1, "micro-batches follow training.max_tokens_per_device, so it must be 1"
    )
    if section.per_device_train_batch_size is None:
        number("train_micro_batch_size_per_gpu", int, 1, "the recipe decides it by training.max_tokens_per_device")
    else:
        batch = section.per_device_train_batch_size
        why = f"the recipe's training.per_device_train_batch_size is {batch}"
        number("train_micro_batch_size_per_gpu", int, batch, why)
    documents = section.documents_per_step
    number("train_batch_size", int, documents, f"the recipe's training.documents_per_step is {documents}")
    for name, instead in _THE_RECIPES.items():
        if name in config:
            refuse(name, f"the recipe decides this; remove it and use {instead}")
    for name in sorted(config.keys() - {*_THE_RECIPES, *_PRECISION, *_NUMBERS, *_PASSED_ON}):
        near = difflib.get_close_matches(name, [*_NUMBERS, *_PASSED_ON], 1)
        refuse(name, f"is not supported; remove it{f', or write {near[0]} if that was meant' if near else ''}")
    for name in _PRECISION:
        part = config.get(name, {})
        enabled = part.get("enabled", False) if isinstance(part, Mapping) else part
        if enabled is not False and enabled != "auto":
            refuse(
                name, "retrofit autocasts over float32 weights itself; remove it and set training.bf16 in the recipe"
            )
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, Mapping) else {}
    stage = zero.get("stage")
    if isinstance(stage, str):
        refuse("zero_optimization.stage", f'expected an integer, found the text "{stage}"; write it without quotes')
    elif not _is_number(stage) or stage not in (1, 2, 3):
        refuse(
            "zero_optimization.stage",
            f"is {json.dumps(stage)}; use 1, 2 or 3, or launch/accelerate/ddp.yaml for training without ZeRO",
        )
    if stage == 3 and section.compile:
        refuse(
            "zero_optimization.stage",
            "3 gathers weights by hooks inside the blocks, which training.compile: true cannot compile; "
            "use FSDP2 (launch/accelerate/fsdp2.yaml), or set training.compile: false",
        )
    for name in _OFFLOADING:
        part = zero.get(name)
        if (part.get("device", "none") if isinstance(part, Mapping) else part) not in (None, "none", False):
            refuse(f"zero_optimization.{name}", "offloading is not supported; remove it, and shard over more devices")
    for name, off in _UNSUPPORTED.items():
        if zero.get(name, off) not in (off, "auto"):
            refuse(f"zero_optimization.{name}", "is not supported; remove it (FSDP2 shards within nodes)")
    for name, value in zero.items():
        if name != "stage" and name not in _OFFLOADING and isinstance(value, str) and value != "auto":
            refuse(f"zero_optimization.{name}", f'expected a number, true or false, found the text "{value}"')
    if problems:
        raise ValueError("\n".join(problems))
    kept = {name: value for name, value in config.items() if name not in _PRECISION}
    settings = {name: value for name, value in zero.items() if value != "auto"}
    if stage == 3:
        # DeepSpeed's own F.linear replaces torch's in the whole process, and knows no autocast of float32 weights.
        settings["memory_efficient_linear"] = False
    resolved = {
        **kept,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "train_batch_size": world_size,
        "gradient_clipping": norm,
        "zero_optimization": settings,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    left = sorted(name for name, value in resolved.items() if value == "auto")
    if left:
        raise ValueError(f'{source}: {", ".join(left)}: "auto" has no meaning here; give a value or remove it')
    return resolved


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
