"""The two training objectives behind one interface: corrupt a step's documents, cut micro-batches, score a model.

Shape legend: B documents, T packed rows, M masked rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.flexmdm.configuration import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.modeling import add_slots
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths

from .interpolant import Corrupted, corrupt, count_survivors
from .losses import insertion_sums, unmasking_sums
from .times import UNIFORM, TimeDensity

_MASKING_NOISE = 3


class Documents(Protocol):
    """Clean, right-padded: tokens int64 [B, L], lengths int64 [B], kept bool [B, L], open_gaps bool [B, L + 1]."""

    @property
    def tokens(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def kept(self) -> Tensor: ...
    @property
    def open_gaps(self) -> Tensor: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass trains on; may hold no sequence at all.

    Attributes:
        packed: the corrupted sequences.
        timesteps: float64 [B]. weights: float64 [B], 1 over the density of t there, a factor of both terms.
        ordinals: int64 [B], the global ordinals of the draws.
        mask_rows: int64 [M], rows that are masked; targets: int64 [M], their clean tokens.
        gaps: int64 [T], deleted tokens before each row, or None for an MDM.
        open_gaps: bool [T], gaps that enter the loss, or None for an MDM.
    """

    packed: PackedSequences
    timesteps: Tensor
    weights: Tensor
    ordinals: Tensor
    mask_rows: Tensor
    targets: Tensor
    gaps: Tensor | None = None
    open_gaps: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Rows that are computed, slots included."""
        return self.packed.tokens.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device. A copy from pinned memory to a GPU does not wait."""
        non_blocking = torch.device(device).type != "cpu"
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The same micro-batch in pinned memory."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, do: Callable[[Any], Any]) -> MicroBatch:
        return replace(self, **{name: do(value) for name, value in vars(self).items() if value is not None})


class Examples(Protocol):
    """A step's corrupted documents."""

    @property
    def lengths(self) -> Tensor:
        """int64 [B]: rows that each document costs."""

    def micro_batch(self, rows: Sequence[int]) -> MicroBatch:
        """The documents at these rows (any number, none included), packed."""


class Objective(Protocol):
    """What training needs to know of an objective."""

    def prepare(self, documents: Documents, ordinals: Tensor, u: Tensor) -> Examples:
        """Corrupts documents: ordinals int64 [B] key the noise; u, float64 [B] in (0, 1), becomes t."""

    def count_rows(self, kept: Tensor, lengths: Tensor, ordinals: Tensor, u: Tensor) -> Tensor:
        """int64 [B]: `prepare(...).lengths`, cheaply. kept: bool [T], the documents' flags laid end to end."""

    def loss_terms(self, model: Any, batch: MicroBatch) -> dict[str, Tensor]:
        """Terms of the loss, each float32 [B], sums over positions, whose mean over t is that of uniform t.

        `model` may be wrapped by an engine.
        """


@dataclass(frozen=True)
class FlexMDMExamples:
    corrupted: Corrupted
    ordinals: Tensor
    t: Tensor
    weights: Tensor
    slot: int

    @property
    def lengths(self) -> Tensor:
        return self.corrupted.lengths + 1

    def micro_batch(self, rows: Sequence[int]) -> MicroBatch:
        index = torch.as_tensor(rows, dtype=torch.int64)
        c = Corrupted(**{name: value[index] for name, value in vars(self.corrupted).items()})
        packed = add_slots(c.tokens, c.lengths, self.slot, kept=c.kept, open_gaps=c.open_gaps)
        occupied = torch.arange(c.gaps.shape[1]) <= c.lengths[:, None]  # rows and slots, in packed order
        return MicroBatch(
            packed=packed,
            timesteps=self.t[index],
            weights=self.weights[index],
            ordinals=self.ordinals[index],
            mask_rows=F.pad(c.masked, (0, 1))[occupied].nonzero().squeeze(-1),
            targets=c.targets[c.masked],
            gaps=c.gaps[occupied],
            open_gaps=c.open_gaps[occupied],
        )


class FlexMDMObjective:
    """Any-order, variable-length masked diffusion (arXiv 2509.01025)."""

    def __init__(self, config: FlexMDMConfig, seed: int, times: TimeDensity = UNIFORM):
        self.config = config
        self.schedules = config.schedules
        self.seed = seed
        self.times = times

    def prepare(self, documents: Documents, ordinals: Tensor, u: Tensor) -> FlexMDMExamples:
        """See `Objective.prepare`."""
        t, weights = self.times.draw(u)
        corrupted = corrupt(
            documents.tokens,
            documents.lengths,
            t,
            kept=documents.kept,
            open_gaps=documents.open_gaps,
            schedules=self.schedules,
            mask_token_id=self.config.mask_token_id,
            pad_token_id=self.config.pad_token_id,
            key=(self.seed, ordinals),
        )
        return FlexMDMExamples(corrupted, ordinals, t, weights, self.config.pad_token_id)

    def count_rows(self, kept: Tensor, lengths: Tensor, ordinals: Tensor, u: Tensor) -> Tensor:
        """See `Objective.count_rows`."""
        t, _ = self.times.draw(u)
        return count_survivors(kept, lengths, t, schedules=self.schedules, key=(self.seed, ordinals)) + 1

    def loss_terms(self, model: Any, batch: MicroBatch) -> dict[str, Tensor]:
        """`unmasking` and `insertion`, float32 [B]."""
        assert batch.gaps is not None and batch.open_gaps is not None
        out = model(packed=batch.packed, timesteps=batch.timesteps, logit_rows=batch.mask_rows)
        sequence = batch.packed.sequence_ids
        hazard = self.schedules.unmasking_hazard(batch.timesteps) * batch.weights
        unmasking = unmasking_sums(out.logits, batch.targets, sequence[batch.mask_rows], hazard, consume_logits=True)
        hazard = self.schedules.insertion_hazard(batch.timesteps) * batch.weights
        insertion = insertion_sums(out.expected_gaps, batch.gaps, batch.open_gaps, sequence, hazard)
        return {"unmasking": unmasking, "insertion": insertion}


@dataclass(frozen=True)
class MDMExamples:
    tokens: Tensor
    masked: Tensor
    targets: Tensor
    ordinals: Tensor
    t: Tensor
    weights: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.full((self.tokens.shape[0],), self.tokens.shape[1])

    def micro_batch(self, rows: Sequence[int]) -> MicroBatch:
        index = torch.as_tensor(rows, dtype=torch.int64)
        masked = self.masked[index]
        return MicroBatch(
            packed=PackedSequences(self.tokens[index].flatten(), cumulative_lengths(self.lengths[index])),
            timesteps=self.t[index],
            weights=self.weights[index],
            ordinals=self.ordinals[index],
            mask_rows=masked.flatten().nonzero().squeeze(-1),
            targets=self.targets[index][masked],
        )


class MDMObjective:
    """Plain masked diffusion as LLaDA is trained (arXiv 2502.09992): fixed window, EOS-padded answer, loss over p_mask.

    Kept tokens are never masked. The window's EOS padding is content: it is masked and learnt like any other token.
    """

    min_mask_probability = 1e-3  # LLaDA's own: p_mask = (1 - eps) t + eps

    def __init__(self, config: LLaDAConfig, seed: int, window: int):
        self.config = config
        self.seed = seed
        self.window = window

    def mask_probability(self, t: Tensor) -> Tensor:
        """float64 [B]: probability that a token is masked at t."""
        return (1 - self.min_mask_probability) * t.double() + self.min_mask_probability

    def prepare(self, documents: Documents, ordinals: Tensor, u: Tensor) -> MDMExamples:
        """See `Objective.prepare`.

        Raises:
            ValueError: a document is longer than the window.
        """
        longest = int(documents.lengths.max()) if documents.lengths.numel() else 0
        if longest > self.window:
            raise ValueError(f"objective.window: a document of {longest} tokens does not fit a window of {self.window}")
        position = torch.arange(self.window)
        tokens = F.pad(documents.tokens, (0, max(0, self.window - documents.tokens.shape[1])))[:, : self.window]
        clean = torch.where(position < documents.lengths[:, None], tokens, self.config.eos_token_id)
        kept = F.pad(documents.kept, (0, max(0, self.window - documents.kept.shape[1])))[:, : self.window]
        t, weights = UNIFORM.draw(u)  # LLaDA's own
        draws = keyed_uniform(self.seed, _MASKING_NOISE, ordinals[:, None], position)
        masked = (draws < self.mask_probability(t)[:, None]) & ~kept
        return MDMExamples(torch.where(masked, self.config.mask_token_id, clean), masked, clean, ordinals, t, weights)

    def count_rows(self, kept: Tensor, lengths: Tensor, ordinals: Tensor, u: Tensor) -> Tensor:
        """See `Objective.count_rows`: the window, whatever the document."""
        return torch.full_like(lengths, self.window)

    def loss_terms(self, model: Any, batch: MicroBatch) -> dict[str, Tensor]:
        """`unmasking`, float32 [B]."""
        out = model(packed=batch.packed, logit_rows=batch.mask_rows)
        sequence = batch.packed.sequence_ids[batch.mask_rows]
        weights = batch.weights / self.mask_probability(batch.timesteps)
        return {"unmasking": unmasking_sums(out.logits, batch.targets, sequence, weights, consume_logits=True)}
