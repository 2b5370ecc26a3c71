"""The seam to Accelerate: everything that depends on how the processes work together, and nothing else.

One process, or data parallel (DDP) over gloo or NCCL. In every step, on every rank, the loop calls in this order:

    for each micro-batch:  with engine.micro_batch(last=...): loss = ...; engine.backward(loss)
    norm = engine.gradient_norm();  engine.total(...);  engine.step(...)  or  engine.discard()

DDP reduces gradients in the last micro-batch's backward, and it averages over ranks where the loss is a sum: `backward`
multiplies by the number of ranks. A rank whose micro-batch is empty calls the model all the same, since DDP waits for
every trainable's gradient.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer

from .optimizer import NamedParameters, export_state, import_state, trainable_parameters

T = TypeVar("T")

TIME_OUT = datetime.timedelta(minutes=30)
"""How long ranks wait for each other; rank 0 may be hashing or writing a large checkpoint meanwhile."""


class Engine:
    """The processes of this job.

    Args:
        bf16: compute in bfloat16 under autocast.

    Attributes:
        rank, world_size, device: of this process.
        model: what the loss calls. module: the bare model inside it.

    Raises:
        ValueError: the launcher promised more processes than it started, or contradicts the recipe.
    """

    model: nn.Module
    module: nn.Module
    optimizer: Optimizer
    parameters: NamedParameters

    def __init__(self, *, bf16: bool) -> None:
        check_launch(bf16=bf16)
        self.bf16 = bf16
        self.accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            # autocast is ours (see micro_batch): Accelerate's would copy all logits to float32
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                InitProcessGroupKwargs(timeout=TIME_OUT),
            ],
        )
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            kind = self.accelerator.distributed_type.value
            raise ValueError(f"accelerate config: distributed_type {kind} is not supported; use MULTI_GPU or NO")
        self.rank = self.accelerator.process_index
        self.world_size = self.accelerator.num_processes
        self.device = self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def prepare(self, model: nn.Module, make_optimizer: Callable[[NamedParameters], Optimizer]) -> None:
        """Places the model on the device and wraps it; the optimizer is made of the placed parameters."""
        self.module = model.to(self.device)
        self.parameters = trainable_parameters(model)
        self.optimizer = make_optimizer(self.parameters)
        self.model = self.accelerator.prepare_model(model)

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        """Runs one forward and backward whose gradients are dropped, on every rank, before the first step.

        DDP lays out its buckets anew after its first backward, and with more than two ranks the layout decides in which
        order a gradient's shares are added. Without this the first step after a resume would differ in its last bits
        from the same step of the uninterrupted run.
        """
        if self.world_size > 1:
            with self.micro_batch(last=True):
                self.backward(loss())
            self.discard()

    # ---- one step

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around one forward and backward. Gradients are reduced in the last micro-batch of a step only."""
        with ExitStack() as stack:
            if not last:
                stack.enter_context(self.accelerator.no_sync(self.model))
            stack.enter_context(self.autocast())
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss, a sum over its documents."""
        with torch.autocast(self.device.type, enabled=False):
            (loss * self.world_size).backward()

    def gradient_norm(self) -> float:
        """Global 2-norm of all gradients, the same on all ranks; not finite if any gradient is not."""
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        if len(gradients) != len(self.parameters):
            missing = [name for name, p in self.parameters if p.grad is None]
            raise RuntimeError(f"{len(missing)} trainable parameters have no gradient, {missing[0]} for one")
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self, norm: float, max_norm: float | None) -> None:
        """Scales gradients down to `max_norm`, updates, and clears them."""
        if max_norm is not None:
            total = torch.tensor(norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters], max_norm, total)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """Drops the gradients without an update."""
        self.optimizer.zero_grad()

    # ---- between ranks

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in float64."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every rank, in rank order, on the CPU; shapes must be equal."""
        if self.world_size == 1:
            return [tensor.cpu()]
        tensor = tensor.to(self.device)
        tensors = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(tensors, tensor)
        return [item.cpu() for item in tensors]

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
        failed = [bool(flag) for flag in self.gather(torch.tensor([error is not None]).int())]
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(2)
        return result  # type: ignore[return-value]

    def close(self) -> None:
        """Leaves the process group."""
        if self.world_size > 1:
            self.accelerator.end_training()

    # ---- state

    def export_state(self) -> tuple[dict[str, Tensor], int]:
        """Masters and moments by parameter name, in full, and Adam's step count: on rank 0, nothing elsewhere."""
        return export_state(self.optimizer, self.parameters) if self.is_main else ({}, 0)

    def import_state(self, tensors: dict[str, Tensor], step: int) -> None:
        """Restores what `export_state` gave, whatever engine and world size gave it."""
        import_state(self.optimizer, self.parameters, tensors, step)

    def random_states(self) -> dict[str, Tensor]:
        """`rank-00000/cpu` (and `/cuda`) -> uint8 state of the generators that dropout draws from, of all ranks."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            f"rank-{rank:05d}/{kind}": tensor
            for kind, state in states.items()
            for rank, tensor in enumerate(self.gather(state))
        }

    def restore_random_states(self, states: dict[str, Tensor]) -> bool:
        """Sets this rank's generators; False if the states are of another number of ranks or kind of device."""
        saved = len({key.partition("/")[0] for key in states})
        mine = {
            key.partition("/")[2]: state for key, state in states.items() if key.startswith(f"rank-{self.rank:05d}/")
        }
        if saved != self.world_size or ("cuda" in mine) != (self.device.type == "cuda"):
            return False
        torch.set_rng_state(mine["cpu"])
        if "cuda" in mine:
            torch.cuda.set_rng_state(mine["cuda"], self.device)
        return True


def check_launch(*, bf16: bool) -> None:
    """Refuses launches that do not do what they say.

    Raises:
        ValueError: `accelerate launch --cpu --num_processes N` (it sets a rendezvous address but starts one process
            without a rank), or the launcher's mixed precision contradicts the recipe.
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
