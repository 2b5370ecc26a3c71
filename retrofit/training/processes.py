"""The processes of a job: who there is, where they compute, and what they tell each other.

Accelerate starts the process group as the launcher's config says. How the model is spread over the processes is the
engines' affair.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor

from retrofit.sections import Recipe

T = TypeVar("T")


class Processes:
    """This process among those of the job.

    Args:
        bf16: what the recipe says, which the launcher's mixed precision must not contradict.
        time_out: seconds after which a collective gives up; longer than the watch takes to name a rank that hangs.

    Attributes:
        rank, world_size, device: of this process.
        kind: "single", "ddp", "zero" or "fsdp", as the launcher's config says.

    Raises:
        ValueError: the launcher promised more processes than it started, or contradicts the recipe.
    """

    def __init__(self, *, bf16: bool, time_out: float) -> None:
        check_launch(bf16=bf16)
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available() and not _is_sharded_launch(),
            mixed_precision="no",  # autocast is the engine's: Accelerate's would copy all logits to float32
            kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=time_out))],
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        launched = self.accelerator.distributed_type.value
        kinds = {"NO": "single", "MULTI_CPU": "ddp", "MULTI_GPU": "ddp", "DEEPSPEED": "zero", "FSDP": "fsdp"}
        if launched not in kinds:
            raise ValueError(
                f"accelerate config: distributed_type {launched} is not supported; use MULTI_GPU, DEEPSPEED, FSDP or NO"
            )
        self.kind = kinds[launched]

    def deepspeed_config(self, recipe: Recipe) -> dict[str, Any] | None:
        """The launcher's DeepSpeed configuration, resolved against the recipe; None under another engine.

        Raises:
            ValueError: it contradicts the recipe (all contradictions, with both values).
        """
        if self.kind != "zero":
            return None
        from .deepspeed_config import resolve

        plugin = self.accelerator.state.deepspeed_plugin
        source = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "accelerate config")
        return resolve(plugin.hf_ds_config.config, source, recipe, self.world_size)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float] | Tensor) -> list[float]:
        """Sums over ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, values: Sequence[float] | Tensor) -> list[float]:
        """Largest values over ranks, in float64."""
        return self._reduced(values, dist.ReduceOp.MAX)

    def _reduced(self, values: Sequence[float] | Tensor, operation: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.as_tensor(values, dtype=torch.float64, device=self.device).clone()
        if self.world_size > 1:
            dist.all_reduce(tensor, operation)
        return cast(list[float], tensor.tolist())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.total([flag])[0] > 0

    def gather(self, value: T) -> list[T]:
        """The plain value of every rank, in rank order."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def on_main(self, work: Callable[[], T]) -> T:
        """Runs `work` on rank 0 and gives its result (plain values) to all.

        An error is raised on rank 0; the others leave without a word, so that the user reads it once.
        """
        if self.world_size == 1:
            return work()
        message: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_main:
            try:
                message[0] = work()
            except Exception as caught:
                error, message[1] = caught, str(caught)
        dist.broadcast_object_list(message, src=0, device=self.device)
        if error is not None:
            raise error
        if message[1] is not None:
            raise SystemExit(2)
        result: T = message[0]
        return result

    def together(self, work: Callable[[], T]) -> T:
        """Runs `work` on every rank; if it fails on any, all leave, and the first such rank alone raises the error."""
        result: T | None = None
        error: Exception | None = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        failed = self.gather(error is not None)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(2)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leaves the process group."""
        if self.world_size > 1:
            self.accelerator.end_training()


def _is_sharded_launch() -> bool:
    return any(os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true" for name in ("DEEPSPEED", "FSDP"))


def check_launch(*, bf16: bool) -> None:
    """Refuses launches that do not do what they say.

    Raises:
        ValueError: `accelerate launch --cpu --num_processes N` (it sets a rendezvous address but starts one process
            without a rank), the launcher's mixed precision contradicts the recipe, or its FSDP is not the second or
            offloads.
    """
    environment = os.environ
    launched_by_accelerate = "ACCELERATE_MIXED_PRECISION" in environment
    if launched_by_accelerate and "MASTER_ADDR" in environment and "RANK" not in environment:
        raise ValueError(
            "accelerate launch was asked for several processes but started one, as it does with --cpu or "
            "distributed_type MULTI_CPU; use --multi_gpu --num_processes N (for CPUs too), or torchrun"
        )
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16" if bf16 else "no"):
        raise ValueError(
            f"mixed_precision is {precision} in the accelerate config and training.bf16 is {str(bf16).lower()} in the "
            "recipe; set the recipe's, and leave the other at no"
        )
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = environment.get("FSDP_VERSION", "1")  # what accelerate takes where none is given
        if version != "2" or environment.get("FSDP_OFFLOAD_PARAMS", "").lower() == "true":
            raise ValueError(
                f"accelerate config: fsdp_version {version} or offloading is not supported; use fsdp_version: 2 "
                "without fsdp_offload_params, as in launch/accelerate/fsdp2.yaml"
            )
