"""Cross-entropy of logits that are too many to be copied: a few rows at a time are float32, and nothing else is.

Shape legend: M rows, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 16 << 20
"""Of float32 logits at a time. Beyond 32 MiB a CPU's allocator asks the system anew each time, at twice the cost."""


def cross_entropy(logits: Tensor, targets: Tensor, *, consume: bool = False) -> Tensor:
    """-log softmax(logits)[target] of each row, as `F.cross_entropy(logits.float(), targets, reduction="none")`.

    The gradient is formed in float32 and rounded once, to the dtype of the logits.

    Args:
        logits: [M, V]. targets: int64 [M], in 0..V-1.
        consume: write the gradient over the logits instead of beside them. For logits that nobody reads once backward
            has begun, their maker included (a linear map does not). What needs them after all raises: a second
            backward pass through this or through any function that saved them.

    Returns:
        float32 [M].
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets, consume)
    return losses


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, consume: bool) -> Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.consume = consume
        rows = _chunk_rows(logits)
        losses = [
            torch.log_softmax(part, dim=-1, dtype=torch.float32).gather(1, target[:, None]).neg_().squeeze(1)
            for part, target in zip(logits.split(rows), targets.split(rows), strict=True)
        ]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """(softmax - one hot of the target) times the gradient of the row's loss.

        Writing over the logits raises their version, by which autograd refuses whoever saved them, this included.
        """
        logits, targets = ctx.saved_tensors
        out = logits if ctx.consume else torch.empty_like(logits)
        rows = _chunk_rows(logits)
        parts = (tensor.split(rows) for tensor in (logits, targets, gradient, out))
        for part, target, scale, result in zip(*parts, strict=True):
            p = torch.softmax(part, dim=-1, dtype=torch.float32)
            p[torch.arange(len(target), device=p.device), target] -= 1
            result.copy_(p.mul_(scale[:, None]))
        return out, None, None


def _chunk_rows(logits: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
