"""A ragged batch without padding: one row of tokens and where each sequence begins.

Shape legend: T tokens in all, B sequences, L longest sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

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
    """

    tokens: Tensor
    cu_seqlens: Tensor
    kept: Tensor | None = None
    closed: Tensor | None = None

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
    def block(self) -> PaddedBlock:
        """Where each row lies in a padded block of the sequences that are not empty."""
        occupied = self.lengths > 0
        lengths = self.lengths[occupied]
        size = int(lengths.max()) if lengths.numel() else 0
        index = (occupied.cumsum(0) - 1)[self.sequence_ids] * size + self.positions
        ragged = bool((lengths != size).any())
        mask = torch.arange(size, device=lengths.device) < lengths[:, None] if ragged else None
        return PaddedBlock(lengths.numel(), size, index, mask)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedSequences:
        """The same batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedSequences:
        """The same batch in pinned memory, from which copies to a GPU need not wait."""
        return self._each(Tensor.pin_memory)

    def _each(self, do: Callable[[Tensor], Tensor]) -> PackedSequences:
        kept, closed = (None if x is None else do(x) for x in (self.kept, self.closed))
        return replace(self, tokens=do(self.tokens), cu_seqlens=do(self.cu_seqlens), kept=kept, closed=closed)


@dataclass(frozen=True)
class PaddedBlock:
    """The layout of packed rows in a block [count, size].

    Attributes:
        index: int64 [T], row -> flat position in the block.
        mask: bool [count, size], True at rows, or None if nothing is padded.
    """

    count: int
    size: int
    index: Tensor
    mask: Tensor | None

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [count, size, ...] with zeros at the padding."""
        if self.mask is None:
            return rows.view(self.count, self.size, *rows.shape[1:])
        block = rows.new_zeros(self.count * self.size, *rows.shape[1:])
        return block.index_copy(0, self.index, rows).view(self.count, self.size, *rows.shape[1:])

    def unpad(self, block: Tensor) -> Tensor:
        """[count, size, ...] -> [T, ...], the inverse of `pad`."""
        flat = block.flatten(0, 1)
        return flat if self.mask is None else flat.index_select(0, self.index)


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
