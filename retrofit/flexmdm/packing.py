"""A ragged batch without padding: one row of tokens and where each sequence begins.

Shape legend: T tokens in all, B sequences, L padded length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedSequences:
    """B sequences laid end to end.

    For a FlexMDM every sequence ends with one slot, a row that holds the pad token: the hidden state of row i predicts
    the gap before it, the slot's predicts the last gap.

    Attributes:
        tokens: int64 [T].
        cu_seqlens: int32 [B + 1]; sequence b occupies rows cu_seqlens[b] to cu_seqlens[b + 1].
        kept: bool [T], tokens that are given, or None where the model is not told.
        closed: bool [T], whether the gap before the row is closed, or None.
        host_lengths: rows of each sequence as plain numbers, from which a forward is planned without asking the device.
            Where they are not given they are read from cu_seqlens, for which the host waits if that is on a GPU.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    kept: Tensor | None = None
    closed: Tensor | None = None
    host_lengths: tuple[int, ...] = cast(tuple[int, ...], None)

    def __post_init__(self) -> None:
        if self.host_lengths is None:
            object.__setattr__(self, "host_lengths", tuple(self.cu_seqlens.diff().tolist()))

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B]: rows of each sequence, its slot included."""
        return self.cu_seqlens.diff().long()

    @cached_property
    def sequence_ids(self) -> Tensor:
        """int64 [T]: the sequence of each row."""
        ids = torch.arange(self.num_sequences, device=self.tokens.device)
        return ids.repeat_interleave(self.lengths, output_size=self.tokens.numel())

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T]: position of each row in its own sequence, from 0."""
        rows = torch.arange(self.tokens.numel(), device=self.tokens.device)
        return rows - self.cu_seqlens.long()[self.sequence_ids]

    @cached_property
    def last_rows(self) -> Tensor:
        """int64 [B]: the last row of each sequence (its slot, for a FlexMDM)."""
        return self.cu_seqlens[1:].long() - 1

    @cached_property
    def without_empty(self) -> PackedSequences:
        """The same rows as sequences that all have some."""
        if 0 not in self.host_lengths:
            return self
        lengths = tuple(length for length in self.host_lengths if length)
        cu_seqlens = cumulative_lengths(torch.tensor(lengths, dtype=torch.int64)).to(self.cu_seqlens.device)
        return replace(self, cu_seqlens=cu_seqlens, host_lengths=lengths)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedSequences:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSequences:
        """The same batch in pinned memory, from which copies to a GPU need not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, do: Callable[[Tensor], Tensor]) -> PackedSequences:
        kept, closed = (None if x is None else do(x) for x in (self.kept, self.closed))
        return replace(self, tokens=do(self.tokens), cu_seqlens=do(self.cu_seqlens), kept=kept, closed=closed)


def cumulative_lengths(lengths: Tensor) -> Tensor:
    """int32 [B + 1] row offsets of sequences with these lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def pack(sequences: Sequence[Sequence[int]], *, slot: int | None = None) -> PackedSequences:
    """Packs lists of token ids, each followed by the token `slot` if one is given.

    Example:
        pack([[5, 6], []], slot=0).tokens  # tensor([5, 6, 0, 0])
    """
    end = [] if slot is None else [slot]
    rows = [[*sequence, *end] for sequence in sequences]
    tokens = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return PackedSequences(tokens, cumulative_lengths(torch.tensor([len(row) for row in rows], dtype=torch.int64)))


def lengths_from_mask(attention_mask: Tensor) -> Tensor:
    """int64 [B] lengths of right-padded rows from an attention mask [B, L].

    Raises:
        ValueError: a row is padded on the left or in the middle.
    """
    lengths = attention_mask.long().sum(1)
    expected = torch.arange(attention_mask.shape[1], device=lengths.device) < lengths[:, None]
    if not torch.equal(attention_mask.bool(), expected):
        raise ValueError("attention_mask: only padding on the right is supported; move it to the end of each row")
    return lengths
