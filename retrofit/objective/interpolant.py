"""The corruption of FlexMDM: clean sequences to x_t, with what the network has to predict (docs/mathematics.md).

Shape legend: B sequences, L padded length of the clean sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.flexmdm.noise import keyed_uniform, ragged_uniform
from retrofit.flexmdm.schedules import Schedules

IGNORED_TARGET = -100

# Keys of the two hitting times, apart from every other use of the same seed and ordinal.
_INSERTION_NOISE, _UNMASKING_NOISE = 1, 2


@dataclass(frozen=True)
class Corrupted:
    """Sequences x_t, right-padded to the length of the clean ones.

    Attributes:
        tokens: int64 [B, L]: survivors in order, masks among them, then pad tokens.
        lengths: int64 [B]: number of survivors.
        gaps: int64 [B, L + 1]: deleted tokens between survivors j - 1 and j; 0 past the length.
        masked: bool [B, L].
        targets: int64 [B, L]: clean token of each mask, -100 elsewhere.
        kept: bool [B, L]: survivors that were never deletable.
        open_gaps: bool [B, L + 1]: gaps in which tokens may be missing; False past the length.
    """

    tokens: Tensor
    lengths: Tensor
    gaps: Tensor
    masked: Tensor
    targets: Tensor
    kept: Tensor
    open_gaps: Tensor


def corrupt(
    x1: Tensor,
    lengths: Tensor,
    t: Tensor,
    *,
    kept: Tensor | None,
    schedules: Schedules,
    mask_token_id: int,
    pad_token_id: int,
    open_gaps: Tensor | None = None,
    insertion_time: Tensor | None = None,
    unmasking_time: Tensor | None = None,
    key: tuple[int, Tensor] | None = None,
) -> Corrupted:
    """Draws x_t given x1 (arXiv 2509.01025, the joint interpolant).

    Each token that is not kept has an insertion time T1 and an unmasking time T2 >= T1; at t it is deleted (t < T1), a
    mask (T1 <= t < T2) or clean.

    Args:
        x1: int64 [B, L], right-padded. lengths: int64 [B].
        t: float [B] in [0, 1].
        kept: bool [B, L], tokens that are never deleted nor masked (None: none).
        open_gaps: bool [B, L + 1], which gaps of x1 are open (None: all). A gap beside a token that is not kept is open
            whatever is said here.
        insertion_time, unmasking_time: float [B, L], the hitting times, if they are given rather than drawn.
        key: (seed, ordinals int64 [B]); the hitting times are a function of seed, ordinal and position alone.

    Raises:
        ValueError: neither hitting times nor a key is given, or both are.

    Example:
        corrupt(x1, lengths, t, kept=None, schedules=Schedules(Linear(), Linear()), mask_token_id=5, pad_token_id=0,
                key=(0, torch.arange(len(x1))))
    """
    if (key is None) == (insertion_time is None or unmasking_time is None):
        raise ValueError("corrupt needs either both hitting times or a key (seed, ordinals)")
    batch, size = x1.shape
    position = torch.arange(size, device=x1.device)
    exists = position < lengths[:, None]
    kept = (torch.zeros_like(exists) if kept is None else kept.bool()) & exists
    free = exists & ~kept
    if key is not None:
        seed, ordinals = key
        u1, u2 = (
            keyed_uniform(seed, purpose, ordinals[:, None], position)
            for purpose in (_INSERTION_NOISE, _UNMASKING_NOISE)
        )
        insertion_time, unmasking_time = schedules.hitting_times(u1, u2)
    assert insertion_time is not None and unmasking_time is not None
    now = t[:, None]
    deleted = free & (now < insertion_time)
    hidden = free & ~deleted & (now < unmasking_time)
    survives = exists & ~deleted

    before = F.pad(survives.long().cumsum(1), (1, 0))  # [B, L + 1]: survivors left of each gap of x1
    # Survivor i of x1 is row before[i] of x_t; what does not survive goes to a last column that is cut off.
    target_column = torch.where(survives, before[:, :-1], size)

    def gather_survivors(values: Tensor, fill: int | bool) -> Tensor:
        out = torch.full((batch, size + 1), fill, dtype=values.dtype, device=x1.device)
        return out.scatter(1, target_column, values)[:, :-1]

    if open_gaps is None:
        open_x1 = torch.ones(batch, size + 1, dtype=torch.bool, device=x1.device)
    else:
        open_x1 = open_gaps.bool() | F.pad(free, (1, 0)) | F.pad(free, (0, 1))
    open_x1 = open_x1 & (torch.arange(size + 1, device=x1.device) <= lengths[:, None])

    zeros = torch.zeros(batch, size + 1, dtype=torch.long, device=x1.device)
    new_lengths = survives.sum(1)
    row = torch.arange(size, device=x1.device)
    tokens = gather_survivors(torch.where(hidden, mask_token_id, x1), 0)
    return Corrupted(
        tokens=torch.where(row < new_lengths[:, None], tokens, pad_token_id),
        lengths=new_lengths,
        gaps=zeros.scatter_add(1, before[:, :-1], deleted.long()),
        masked=gather_survivors(hidden, False),
        targets=gather_survivors(torch.where(hidden, x1, IGNORED_TARGET), IGNORED_TARGET),
        kept=gather_survivors(kept, False),
        open_gaps=zeros.scatter_add(1, before, open_x1.long()) > 0,
    )


def count_survivors(
    kept: Tensor, lengths: Tensor, t: Tensor, *, schedules: Schedules, key: tuple[int, Tensor]
) -> Tensor:
    """The lengths of x_t that `corrupt` would draw, from a fraction of its work: no token is looked at.

    Args:
        kept: bool [T], the sequences' flags laid end to end. lengths: int64 [B], their sum is T.
        t, key: as for `corrupt`.

    Returns:
        int64 [B].
    """
    seed, ordinals = key
    times = schedules.insertion_times(ragged_uniform(lengths, seed, _INSERTION_NOISE, ordinals))
    survives = (times <= t.repeat_interleave(lengths, output_size=kept.numel())) | kept
    ends = lengths.cumsum(0)
    return F.pad(survives.cumsum(0), (1, 0))[torch.stack((ends - lengths, ends))].diff(dim=0).squeeze(0)
