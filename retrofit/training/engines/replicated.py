"""One process, or a whole copy of the model in each: data parallel (DDP) over gloo or NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from retrofit.checkpoints.weights import materialise

from .base import Engine, MakeOptimizer, ReadTensor


class ReplicatedEngine(Engine):
    """Gradients are reduced in the last micro-batch's backward.

    A rank whose micro-batch is empty calls the model all the same: DDP waits for every trainable's gradient.
    """

    name = "ddp"

    def prepare(self, model: nn.Module, read: ReadTensor, make_optimizer: MakeOptimizer) -> None:
        """See `Engine.prepare`."""
        materialise(model, read, on_leaf=lambda leaf: leaf.to(self.device))
        self.module = self.model = model
        self._take_trainables(model, make_optimizer)
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

    def discard(self) -> None:
        """See `Engine.discard`. DDP's gradients are views of its buckets, which stay: without them the next step would
        accumulate in memory of its own beside the buckets."""
        self.optimizer.zero_grad(set_to_none=self.model is self.module)

    def masters_changed(self) -> None:
        """See `Engine.masters_changed`. The masters are the model's own weights."""

    def read(self, kind: str, name: str) -> Tensor:
        """See `Engine.read`."""
        return self._state(kind, name)

    @torch.no_grad()
    def write(self, kind: str, name: str, tensor: Tensor) -> None:
        """See `Engine.write`."""
        self.read(kind, name).copy_(tensor)
