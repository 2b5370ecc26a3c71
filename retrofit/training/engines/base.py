"""What training asks of an engine, whichever way the model is spread over the processes.

In every step, on every rank, the loop calls in this order:

    for each micro-batch:  with engine.micro_batch(last=...): loss = ...; engine.backward(loss)
    norm = engine.gradient_norm();  (all ranks agree);  engine.step(...)  or  engine.discard()

bfloat16 is autocast over float32 trainables in every engine, so the weights that the optimizer updates are the masters.
Training state has one form for all: for each trainable parameter, by name, a full float32 tensor of each kind in
`kinds`. What is not abstract here is for engines whose optimizer updates the model's own parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from ..optimizer import MOMENTS, NamedParameters, clip_gradients, total_norm, trainable_parameters
from ..processes import Processes

MASTER, AVERAGE = "master", "ema"

ReadTensor = Callable[[str], Tensor]
MakeOptimizer = Callable[[NamedParameters], AdamW]


class Engine(ABC):
    """A model spread over the processes, with its optimizer.

    Args:
        bf16: compute in bfloat16 under autocast.
        average: keep a moving average of the trainable weights.

    Attributes:
        name: of the engine, as a checkpoint records it.
        model: what the loss calls. module: the bare model inside it.
        optimizer: AdamW over `masters`. parameters: (name, parameter) of all trainable ones, in the model's order.
        kinds: "master", "exp_avg", "exp_avg_sq" and, with an average, "ema".
        survives_failed_backward: whether another micro-batch may follow a backward that was broken off.
    """

    name: str
    survives_failed_backward = True
    model: nn.Module
    module: nn.Module
    optimizer: AdamW
    parameters: NamedParameters

    def __init__(self, processes: Processes, *, bf16: bool, average: bool) -> None:
        self.processes = processes
        self.bf16 = bf16
        self.kinds = (MASTER, *MOMENTS, *([AVERAGE] if average else []))

    @property
    def device(self) -> torch.device:
        return self.processes.device

    # ---- before the first step

    @abstractmethod
    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """Makes a model on the meta device real and spreads it; the optimizer is made of the trainable parameters.

        Args:
            read: parameter's name -> its full tensor on the CPU, in the parameter's dtype.
        """

    def _take_trainables(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Notes the trainable parameters, as the engine has laid them out, and makes the optimizer of them."""
        self.parameters = trainable_parameters(model)
        self._by_name = dict(self.parameters)
        self.optimizer = make_optimizer(self.parameters)

    def create_state(self) -> None:
        """Creates the optimizer's state as a first step would; the average starts at the weights."""
        for master in self.masters():
            self.optimizer.state[master] = {
                "step": torch.tensor(0.0, device=master.device),
                **{kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS},
                **({AVERAGE: master.detach().clone()} if AVERAGE in self.kinds else {}),
            }

    def warm_up(self, loss: Callable[[], Tensor]) -> None:
        """Runs one forward and backward whose gradients are dropped, on every rank, before the first step.

        An engine may lay its buffers out anew after its first backward, and the layout decides in which order a
        gradient's shares are added. Without this the first step after a resume would differ in its last bits from the
        same step of the uninterrupted run.
        """
        if self.processes.world_size > 1:
            with self.micro_batch(last=True):
                self.backward(loss())
            self.discard()

    # ---- one step

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around one forward and backward; `last` marks the last of the step."""
        with self.autocast():
            yield

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of this rank's share of the loss, a sum over its documents.

        All engines average over ranks, hence the factor.
        """
        with torch.autocast(self.device.type, enabled=False):
            self._backward(loss * self.processes.world_size)

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradient_norm(self) -> float:
        """Global 2-norm of all gradients, the same on all ranks; not finite (or negative) if any gradient is not."""
        return float(total_norm(self.parameters))

    def step(self, norm: float, max_norm: float | None) -> None:
        """Scales gradients down to `max_norm`, updates, and clears them. Nothing else changes masters."""
        clip_gradients(self.parameters, norm, max_norm)
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        """Drops the gradients without an update."""
        self.optimizer.zero_grad()

    # ---- state

    def masters(self) -> list[Tensor]:
        """The float32 tensors of this rank that the optimizer updates: parameters, or flat parts of many."""
        return [parameter for _, parameter in self.parameters]

    def _state(self, kind: str, name: str) -> Tensor:
        """Where the optimizer updates the parameters themselves: the parameter, or the optimizer's tensor beside it."""
        parameter = self._by_name[name]
        return parameter.detach() if kind == MASTER else self.optimizer.state[parameter][kind]

    @abstractmethod
    def masters_changed(self) -> None:
        """Brings the model up to date after masters were set from outside of `step`."""

    @abstractmethod
    def read(self, kind: str, name: str) -> Tensor:
        """The full float32 tensor, on the device. All ranks call it in the same order; it may be the state itself."""

    @abstractmethod
    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """Sets this rank's part from a full tensor on the CPU. `masters_changed` has to follow."""

    @property
    def adam_step(self) -> int:
        """Updates that Adam has counted."""
        return int(self.optimizer.state[self.masters()[0]]["step"])

    def restore(self, read: Callable[[str, str], Tensor], adam_step: int) -> None:
        """Sets the whole state.

        Args:
            read: (kind, name) -> full float32 tensor on the CPU.
        """
        for kind in self.kinds:
            for name, _ in self.parameters:
                self.write(kind, name, read(kind, name))
        for master in self.masters():
            self.optimizer.state[master]["step"] = torch.tensor(float(adam_step), device=master.device)
        self.masters_changed()

    # ---- the average

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay * average + (1 - decay) * weight, in float32.

        LoRA factors are averaged each for itself, as is usual; the average of products is not the product of averages.
        """
        for master in self.masters():
            self.optimizer.state[master][AVERAGE].lerp_(master.detach(), 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the block the model's weights are the average, if one is kept."""
        if AVERAGE not in self.kinds:
            yield
            return
        kept = [master.detach().clone() for master in self.masters()]
        self._set_masters([self.optimizer.state[master][AVERAGE] for master in self.masters()])
        try:
            yield
        finally:
            self._set_masters(kept)

    @torch.no_grad()
    def _set_masters(self, values: list[Tensor]) -> None:
        for master, value in zip(self.masters(), values, strict=True):
            master.copy_(value)
        self.masters_changed()
