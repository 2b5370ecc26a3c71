"""One process, or a whole copy of the model in each: data parallel (DDP) over gloo or NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retrofit.checkpoints.weights import materialise

from ..optimizer import clip_gradients, total_norm, trainable_parameters
from .base import MASTER, Engine, MakeOptimizer, ReadTensor


class ReplicatedEngine(Engine):
    """Gradients are reduced in the last micro-batch's backward.

    A rank whose micro-batch is empty calls the model all the same: DDP waits for every trainable's gradient.
    """

    name = "ddp"

    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.prepare`."""
        materialise(model, read, on_leaf=lambda leaf: leaf.to(self.device))
        self.module = self.model = model
        self.parameters = trainable_parameters(model)
        self._by_name = dict(self.parameters)
        self.optimizer = make_optimizer(self.parameters)
        self.create_state()
        if self.processes.world_size > 1:
            devices = [self.device.index] if self.device.type == "cuda" else None
            self.model = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """See `Engine.micro_batch`."""
        with ExitStack() as stack:
            if not last and isinstance(self.model, DistributedDataParallel):
                stack.enter_context(self.model.no_sync())
            stack.enter_context(self.autocast())
            yield

    def gradient_norm(self) -> float:
        """See `Engine.gradient_norm`."""
        return float(total_norm(self.parameters))

    def step(self, norm: float, max_norm: float | None) -> None:
        """See `Engine.step`."""
        clip_gradients(self.parameters, norm, max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def discard(self) -> None:
        """See `Engine.discard`."""
        self.optimizer.zero_grad()

    def masters(self) -> list[Tensor]:
        """See `Engine.masters`."""
        return [parameter for _, parameter in self.parameters]

    def masters_changed(self) -> None:
        """See `Engine.masters_changed`. The masters are the model's own weights."""

    def read(self, kind: str, name: str) -> Tensor:
        """See `Engine.read`."""
        parameter = self._by_name[name]
        return parameter.detach() if kind == MASTER else self.optimizer.state[parameter][kind]

    @torch.no_grad()
    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """See `Engine.write`."""
        self.read(kind, name).copy_(tensor)
