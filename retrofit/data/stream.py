"""The stream of training steps: which documents, with what noise, in which micro-batch of which rank.

Everything about an example is a function of (seed, ordinal of its draw). A step's ordinals depend on the step alone;
ranks, workers, accumulation and the token budget only decide who computes what.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.utils.data import Dataset

from retrofit.flexmdm.noise import keyed_permutation, keyed_uniform, permuted
from retrofit.objective.objectives import Examples, MicroBatch, Objective

from .store import TokenStore

# Keys of the draws that are not the objective's own.
_ORDER, _STRATUM, _TIME = 11, 12, 13

_COUNTED_AT_ONCE = 64
"""Documents whose lengths are drawn together: so many stay within a core's cache."""


# Up to so many documents an epoch's order is made as a whole, beyond it place by place: workers of a large store start
# at once and hold none of it.
_WHOLE_ORDER = 1 << 16


@lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int) -> Tensor:
    return keyed_permutation(size, seed, _ORDER, epoch)


def document_order(ordinals: Tensor, size: int, seed: int) -> Tensor:
    """int64 [B]: the document of each draw. Each run of `size` ordinals is a fresh permutation of all documents."""
    epochs, places = ordinals // size, ordinals % size
    out = torch.empty_like(ordinals)
    for epoch in epochs.unique().tolist():
        at = epochs == epoch
        if size <= _WHOLE_ORDER:
            out[at] = _epoch_order(size, seed, epoch)[places[at]]
        else:
            out[at] = permuted(places[at], size, seed, _ORDER, epoch)
    return out


def stratified_uniforms(ordinals: Tensor, strata: int, seed: int) -> Tensor:
    """float64 [B]: of each draw the u, uniform on (0, 1), of which the objective makes its t.

    Each block of `strata` consecutive ordinals has one u in every interval of length 1 / strata, in permuted order, so
    that a step's loss varies less.
    """
    blocks, places = ordinals // strata, ordinals % strata
    stratum = torch.empty_like(ordinals)
    for block in blocks.unique().tolist():
        at = blocks == block
        stratum[at] = keyed_permutation(strata, seed, _STRATUM, block)[places[at]]
    return (stratum + keyed_uniform(seed, _TIME, ordinals)) / strata


def balance(lengths: Sequence[int], bins: int) -> list[list[int]]:
    """Spreads documents over bins, longest first into the emptiest (greedy, within 4/3 of the best balance).

    Returns:
        `bins` lists of indices into `lengths`, the longest first (attention pads neighbours alike); some may be empty.
    """
    members: list[list[int]] = [[] for _ in range(bins)]
    emptiest = [(0, 0, b) for b in range(bins)]  # a heap of (load, documents, bin)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        load, count, b = emptiest[0]
        heapq.heapreplace(emptiest, (load + lengths[index], count + 1, b))
        members[b].append(index)
    return members


@dataclass(frozen=True)
class StepBatches:
    """What one rank computes in a step.

    Attributes:
        micro_batches: this rank's, as many on every rank.
        rows: rows of each micro-batch of each rank (micro-batch, rank), known to all ranks.
    """

    micro_batches: list[MicroBatch]
    rows: list[list[int]]

    def pin_memory(self) -> StepBatches:
        """The same in pinned memory, from which copies to a GPU need not wait."""
        return StepBatches([batch.pin_memory() for batch in self.micro_batches], self.rows)


@dataclass(frozen=True)
class _Draws:
    """Of each draw its ordinal and its document in the store, int64 [B], and the u of its t, float64 [B]."""

    ordinals: Tensor
    documents: Tensor
    u: Tensor

    def __getitem__(self, rows: Tensor) -> _Draws:
        return _Draws(self.ordinals[rows], self.documents[rows], self.u[rows])


class StepStream(Dataset[StepBatches]):
    """`stream[step]` is this rank's part of a step.

    Args:
        documents_per_step: documents of a step over all ranks.
        time_strata: block of ordinals over which u, and with it t, is stratified.
        max_tokens_per_device: most rows of a micro-batch, counted after deletion.
        micro_batches: least number of micro-batches of a step on each rank.
        max_steps: length of the stream.
    """

    def __init__(
        self,
        store: TokenStore,
        objective: Objective,
        *,
        seed: int,
        documents_per_step: int,
        time_strata: int,
        max_tokens_per_device: int,
        micro_batches: int = 1,
        rank: int = 0,
        world_size: int = 1,
        max_steps: int,
    ):
        self.store = store
        self.objective = objective
        self.seed = seed
        self.documents_per_step = documents_per_step
        self.time_strata = time_strata
        self.max_tokens_per_device = max_tokens_per_device
        self.micro_batches = micro_batches
        self.rank = rank
        self.world_size = world_size
        self.max_steps = max_steps

    def __len__(self) -> int:
        return self.max_steps

    def ordinals(self, step: int) -> Tensor:
        """int64 [documents_per_step]: the draws of a step."""
        return torch.arange(step * self.documents_per_step, (step + 1) * self.documents_per_step)

    def _draws(self, ordinals: Tensor) -> _Draws:
        documents = document_order(ordinals, len(self.store), self.seed)
        return _Draws(ordinals, documents, stratified_uniforms(ordinals, self.time_strata, self.seed))

    def examples(self, ordinals: Tensor) -> Examples:
        """The corrupted documents of these draws."""
        return self._examples(self._draws(ordinals))

    def _examples(self, draws: _Draws) -> Examples:
        return self.objective.prepare(self.store.documents(draws.documents), draws.ordinals, draws.u)

    def _count_rows(self, draws: _Draws) -> list[int]:
        """The lengths of `_examples(draws)`, cheaply."""
        rows: list[int] = []
        for part in torch.arange(len(draws.ordinals)).split(_COUNTED_AT_ONCE):
            some = draws[part]
            kept, lengths = self.store.kept(some.documents)
            rows += self.objective.count_rows(kept, lengths, some.ordinals, some.u).tolist()
        return rows

    def __getitem__(self, step: int) -> StepBatches:
        # Every rank needs the lengths of all documents to find its own, and corrupts only those.
        draws, size = self._draws(self.ordinals(step)), self.world_size
        lengths = self._count_rows(draws)
        bins = self.cut(lengths)
        loads = [sum(lengths[i] for i in rows) for rows in bins]
        own = bins[self.rank :: size]
        examples = self._examples(draws[torch.tensor([i for rows in own for i in rows], dtype=torch.int64)])
        ends = list(accumulate(map(len, own), initial=0))
        return StepBatches(
            micro_batches=[examples.micro_batch(range(*places)) for places in pairwise(ends)],
            rows=[loads[first : first + size] for first in range(0, len(bins), size)],
        )

    def cut(self, lengths: Sequence[int]) -> list[list[int]]:
        """Cuts documents into bins within the token budget, a multiple of the world size of them.

        Raises:
            ValueError: one document alone exceeds the budget.
        """
        if max(lengths) > self.max_tokens_per_device:
            raise ValueError(
                f"training.max_tokens_per_device: {self.max_tokens_per_device} tokens hold no document of "
                f"{max(lengths)}; raise it, or preprocess with a smaller --max-length"
            )
        # Of documents longer than a k-th of the budget, no more than k - 1 go into one bin.
        budget, at_least = self.max_tokens_per_device, -(-sum(lengths) // self.max_tokens_per_device)
        for k in range(2, 9):
            at_least = max(at_least, -(-sum(k * length > budget for length in lengths) // (k - 1)))
        rounds = max(self.micro_batches, -(-at_least // self.world_size))
        while True:
            bins = balance(lengths, rounds * self.world_size)
            if max(sum(lengths[i] for i in rows) for rows in bins) <= self.max_tokens_per_device:
                return bins
            rounds += 1
