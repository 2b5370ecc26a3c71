"""The FlexMDM loss: two packed sums, which training calls, and a dense front over them.

Shape legend: B sequences, L padded length, T packed rows (slots included), M masked rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.flexmdm.schedules import Schedules

from .cross_entropy import cross_entropy
from .interpolant import Corrupted


def unmasking_sums(
    logits: Tensor, targets: Tensor, sequence_ids: Tensor, weights: Tensor, *, consume_logits: bool = False
) -> Tensor:
    """beta' / (1 - beta) times the sum over masks of -log p(clean token | x_t), for each sequence.

    Args:
        logits: [M, V]. targets: int64 [M]. sequence_ids: int64 [M], the sequence of each mask.
        weights: [B], the unmasking hazard at each sequence's t.
        consume_logits: let backward write their gradient over them: see `cross_entropy`.

    Returns:
        float32 [B].
    """
    losses = cross_entropy(logits, targets, consume=consume_logits)
    return losses.new_zeros(weights.shape).index_add(0, sequence_ids, losses) * weights.float()


def insertion_sums(
    expected_gaps: Tensor, gaps: Tensor, open_gaps: Tensor, sequence_ids: Tensor, weights: Tensor
) -> Tensor:
    """alpha' / (1 - alpha) times the sum over open gaps of phi(g, y) = y - g + g log(g / y), for each sequence.

    phi is the Bregman divergence whose minimiser over y is the expected gap; 0 log 0 is 0.

    Args:
        expected_gaps: [T], y. gaps: int64 [T], g. open_gaps: bool [T]. sequence_ids: int64 [T].
        weights: [B], the insertion hazard at each sequence's t.

    Returns:
        float32 [B].
    """
    # A closed gap is taken out before the logarithm: masked only afterwards, its gradient could still be 0 / 0.
    y, g = torch.where(open_gaps, expected_gaps.float(), 1.0), gaps.float()
    losses = torch.where(open_gaps, y - g + torch.xlogy(g, g) - torch.xlogy(g, y), 0.0)
    return losses.new_zeros(weights.shape).index_add(0, sequence_ids, losses) * weights.float()


@dataclass(frozen=True)
class FlexMDMLoss:
    """The two terms of each sequence's loss, float32 [B]: sums over positions, not normalised."""

    unmasking: Tensor
    insertion: Tensor


def flexmdm_loss(
    logits: Tensor, expected_gaps: Tensor, corrupted: Corrupted, t: Tensor, *, schedules: Schedules
) -> FlexMDMLoss:
    """The loss of dense predictions.

    Args:
        logits: [B, L, V]. expected_gaps: [B, L + 1]. t: [B].
        corrupted: what `corrupt` gave.
    """
    masks, gaps = corrupted.masked.nonzero(), corrupted.open_gaps.nonzero()
    return FlexMDMLoss(
        unmasking=unmasking_sums(
            logits[corrupted.masked],
            corrupted.targets[corrupted.masked],
            masks[:, 0],
            schedules.unmasking_hazard(t),
            consume_logits=True,  # a copy of the caller's
        ),
        insertion=insertion_sums(
            expected_gaps[corrupted.open_gaps],
            corrupted.gaps[corrupted.open_gaps],
            corrupted.open_gaps[corrupted.open_gaps],
            gaps[:, 0],
            schedules.insertion_hazard(t),
        ),
    )
