"""The reverse process of a FlexMDM, by tau-leaping.

The sampler drives anything with the packed forward of the model: `model(packed=..., timesteps=...)` and a `config`.

Shape legend: T packed rows (slots included), B sequences, M masked rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .noise import keyed_uniform
from .packing import PackedSequences, cumulative_lengths, pack
from .schedules import Schedules

# Keys of the draws of one sequence at one step.
UNMASK_NOISE, TOKEN_NOISE, ROUNDING_NOISE, COUNT_NOISE = 21, 22, 23, 24

# Rounds of the closing step. Each inserts what the model is still more sure of than not; two nearly always suffice.
_CLOSING_ROUNDS = 8

Trace = Callable[[int, float, list[list[int]]], None]


@dataclass(frozen=True)
class Prompt:
    """What is given of a sequence: kept tokens, and the gaps around them in which tokens may be written.

    Attributes:
        token_ids: the kept tokens, in order.
        open_gaps: len(token_ids) + 1 flags, gap j before token j; None opens the last gap only (a continuation).
    """

    token_ids: Sequence[int]
    open_gaps: Sequence[bool] | None = None


@dataclass(frozen=True)
class Sample:
    """One written sequence.

    Attributes:
        token_ids: the whole sequence, kept tokens included.
        kept: which of them were given.
        forwards: forward passes of its batch.
        truncated: whether it reached the length limit and lost insertions to it.
    """

    token_ids: list[int]
    kept: list[bool]
    forwards: int
    truncated: bool


@dataclass(frozen=True)
class _State:
    """Sequences in the making. `packed` has slots and flags; truncated is bool [B]."""

    packed: PackedSequences
    truncated: Tensor

    def sequences(self) -> list[list[int]]:
        rows = self.packed.tokens.split(self.packed.lengths.tolist())
        return [row[:-1].tolist() for row in rows]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Without dropout, whatever mode the model is in."""
    training = getattr(model, "training", False)
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


@torch.no_grad()
def sample_flexmdm(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    order: str = "random",
    temperature: float = 1.0,
    counts: str = "binomial",
    banned_token_ids: Sequence[int] = (),
    max_length: int | None = None,
    schedules: Schedules | None = None,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    trace: Trace | None = None,
) -> list[Sample]:
    """Tau-leaping from t = 0 to 1 in equal steps, then a closing step.

    In a leap each mask is unmasked with probability (beta1 - beta0) / (1 - beta0) and each open gap receives, of its
    expected y tokens, the share r = (alpha1 - alpha0) / (1 - alpha0) on average. Masks that the last leap inserted get
    one more forward. Then round(y) masks per gap are inserted and unmasked until no y reaches one half: they stand for
    the tokens that would be inserted after alpha_end.

    Args:
        prompts: one for each sequence; they may differ in length.
        order: "random" unmasks each mask independently (exact as steps grow); "confidence" unmasks as many, those
            whose most probable token is most probable.
        temperature: of the token distribution; 0 takes the most probable token.
        counts: "binomial" (of y rounded up or down at random, which keeps its mean) or "poisson" (as published).
        banned_token_ids: never written, besides mask, pad, EOS and what the config bans.
        max_length: most tokens of a sequence; the model's own limit if None.
        schedules: other schedules than the model's. Another insertion schedule needs a model that is fed alpha.
        seed, indices: noise is keyed by (seed, index); indices default to 0, 1, ...
        trace: called after each step with (step, t, sequences).

    Raises:
        ValueError: an argument is out of range, or a prompt does not fit the model.
    """
    config = model.config
    limit = config.max_sequence_length - 1 if max_length is None else max_length
    _check(config, prompts, steps=steps, order=order, temperature=temperature, counts=counts, limit=limit)
    clock = _Clock(config, schedules)
    device = getattr(model, "device", torch.device("cpu"))
    banned = torch.tensor(sorted({*banned_ids(config), *banned_token_ids}), device=device)
    index = torch.arange(len(prompts), device=device) if indices is None else torch.tensor(indices, device=device)
    state = _start(prompts, config.pad_token_id, device)
    forwards = 0

    def predict(t: float) -> Any:
        nonlocal forwards
        forwards += 1
        timesteps = torch.full((len(prompts),), clock.model_time(t), dtype=torch.float64, device=device)
        return model(packed=state.packed, timesteps=timesteps)

    def unmask(logits: Tensor, fraction: float, step: int) -> PackedSequences:
        noise = _RowNoise(seed, index, step, state.packed)
        return _unmask(state.packed, logits, fraction, noise, order, temperature, banned, config.mask_token_id)

    def finish_masks(step: int) -> _State:
        if not bool((state.packed.tokens == config.mask_token_id).any()):
            return state
        return replace(state, packed=unmask(predict(1.0).logits, 1.0, step))

    with evaluating(model):
        for step in range(steps):
            t0, t1 = step / steps, (step + 1) / steps
            out = predict(t0)
            noise = _RowNoise(seed, index, step, state.packed)
            new = _draw_counts(out.expected_gaps, clock.insertion_fraction(t0, t1), noise, counts)
            state = replace(state, packed=unmask(out.logits, clock.unmasking_fraction(t0, t1), step))
            state = _insert(state, new, config.mask_token_id, limit)
            if trace is not None:
                trace(step, t1, state.sequences())
        state = finish_masks(steps)
        for closing_round in range(_CLOSING_ROUNDS):
            new = torch.floor(predict(1.0).expected_gaps + 0.5).long()
            grown = _insert(state, new, config.mask_token_id, limit)
            if grown.packed.tokens.numel() == state.packed.tokens.numel():
                state = grown
                break
            state = grown
            state = finish_masks(steps + 1 + closing_round)
        if trace is not None:
            trace(steps, 1.0, state.sequences())

    kept = [row[:-1].tolist() for row in state.packed.kept.split(state.packed.lengths.tolist())]  # type: ignore[union-attr]
    rows = zip(state.sequences(), kept, state.truncated.tolist(), strict=True)
    return [Sample(tokens, flags, forwards, truncated) for tokens, flags, truncated in rows]


def banned_ids(config: Any) -> set[int]:
    """Token ids that no sampler may write: mask, pad, EOS and the config's own list (headers, end of turn)."""
    return {
        config.mask_token_id,
        config.pad_token_id,
        getattr(config, "eos_token_id", config.pad_token_id),
        *(getattr(config, "banned_token_ids", None) or ()),
    }


class _Clock:
    """Leap fractions under the sampling schedules, and the time that the model has to be told."""

    def __init__(self, config: Any, schedules: Schedules | None):
        trained = config.schedules
        self.schedules = trained if schedules is None else schedules
        self.trained = trained
        other_insertion = self.schedules.insertion != trained.insertion
        if other_insertion and getattr(config, "time_input", "alpha") == "t":
            raise ValueError(
                "schedules: this model was trained on raw t (config time_input is 't'), so it can only be sampled with "
                "its own insertion schedule"
            )
        # Insertion goes no further than the model has seen: a geometric schedule ends at alpha = .990.
        reach = float(trained.alpha(torch.ones((), dtype=torch.float64)))
        self.schedules = replace(self.schedules, alpha_end=min(self.schedules.alpha_end, reach))
        self.warped = other_insertion or self.schedules.alpha_end < reach

    def model_time(self, t: float) -> float:
        """The t at which the model's alpha is the sampler's alpha(t)."""
        if not self.warped:
            return t
        alpha = self.schedules.alpha(torch.tensor(t, dtype=torch.float64))
        return float(self.trained.insertion.inverse(alpha).clamp(0, 1))

    def insertion_fraction(self, t0: float, t1: float) -> float:
        return float(self.schedules.insertion_fraction(*torch.tensor([t0, t1], dtype=torch.float64)))

    def unmasking_fraction(self, t0: float, t1: float) -> float:
        return float(self.schedules.unmasking_fraction(*torch.tensor([t0, t1], dtype=torch.float64)))


@dataclass(frozen=True)
class _RowNoise:
    """One uniform for each row, keyed by (seed, sequence index, step, position in the sequence)."""

    seed: int
    index: Tensor
    step: int
    packed: PackedSequences

    def __call__(self, purpose: int, rows: Tensor | None = None) -> Tensor:
        sequence, position = self.packed.sequence_ids, self.packed.positions
        if rows is not None:
            sequence, position = sequence[rows], position[rows]
        return keyed_uniform(self.seed, self.index[sequence], purpose, self.step, position)


def _check(
    config: Any, prompts: Sequence[Prompt], *, steps: int, order: str, temperature: float, counts: str, limit: int
) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    if order not in ("random", "confidence"):
        raise ValueError(f"order must be 'random' or 'confidence', found {order!r}")
    if counts not in ("binomial", "poisson"):
        raise ValueError(f"counts must be 'binomial' or 'poisson', found {counts!r}")
    check_temperature(temperature)
    if not 0 <= limit < config.max_sequence_length:
        raise ValueError(
            f"max_length {limit}: the model holds {config.max_sequence_length} rows, one of them the end slot; "
            f"at most {config.max_sequence_length - 1}"
        )
    for number, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        if length > limit:
            raise ValueError(f"prompt {number}: its {length} tokens exceed the length limit of {limit}")
        if prompt.open_gaps is not None and len(prompt.open_gaps) != length + 1:
            raise ValueError(f"prompt {number}: {length} tokens have {length + 1} gaps, not {len(prompt.open_gaps)}")
        check_token_ids(prompt.token_ids, number, config.vocab_size)
        for token in prompt.token_ids:
            if token == config.mask_token_id:
                raise ValueError(f"prompt {number}: holds the mask token (id {token}); open a gap instead")


def check_temperature(temperature: float) -> None:
    """Refuses (ValueError) a temperature that is negative, infinite or no number."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a number of at least 0, found {temperature}")


def check_token_ids(token_ids: Sequence[int], number: int, vocab_size: int) -> None:
    """Refuses (ValueError) ids of prompt `number` that are no rows of the embedding."""
    for token in token_ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"prompt {number}: token id {token} is outside the vocabulary of {vocab_size}")


def _start(prompts: Sequence[Prompt], slot: int, device: torch.device | str) -> _State:
    packed = pack([list(prompt.token_ids) for prompt in prompts], slot=slot)
    is_slot = torch.zeros_like(packed.tokens, dtype=torch.bool)
    is_slot[packed.last_rows] = True
    open_gaps = [
        [False] * len(prompt.token_ids) + [True] if prompt.open_gaps is None else [bool(x) for x in prompt.open_gaps]
        for prompt in prompts
    ]
    closed = ~torch.tensor([flag for row in open_gaps for flag in row], dtype=torch.bool)
    packed = replace(packed, kept=~is_slot, closed=closed).to(device)
    return _State(packed, torch.zeros(len(prompts), dtype=torch.bool, device=device))


def draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by inverse distribution function, and the probabilities (at temperature 1) of all.

    Args:
        logits: [M, V]. uniforms: float64 [M].
        temperature: 0 takes the most probable token.
        banned: int64 ids that are never drawn.

    Returns:
        tokens int64 [M], probabilities float32 [M, V].
    """
    logits = logits.float().index_fill(1, banned, -torch.inf)
    probabilities = logits.softmax(-1)
    if temperature == 0:
        return logits.argmax(-1), probabilities
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    # Below the last entry, a level never points past the end; `right` never lands on a token of probability 0.
    levels = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, levels, right=True).squeeze(-1), probabilities


def _unmask(
    packed: PackedSequences,
    logits: Tensor,
    fraction: float,
    noise: _RowNoise,
    order: str,
    temperature: float,
    banned: Tensor,
    mask_token_id: int,
) -> PackedSequences:
    """Replaces some masks by tokens. The number unmasked is the same in both orders; only masks are ever touched."""
    rows = (packed.tokens == mask_token_id).nonzero().squeeze(-1)
    tokens, probabilities = draw_tokens(logits, noise(TOKEN_NOISE, rows), temperature, banned)
    chosen = noise(UNMASK_NOISE, rows) < fraction
    if order == "confidence" and rows.numel():
        chosen = most_confident(probabilities.max(-1).values, packed.sequence_ids[rows], chosen)
    return replace(packed, tokens=packed.tokens.index_put((rows[chosen],), tokens[chosen]))


def most_confident(confidence: Tensor, groups: Tensor, chosen: Tensor) -> Tensor:
    """For each group, as many of its most confident members as are chosen.

    Args:
        confidence: float [M]. groups: int64 [M], rising. chosen: bool [M].

    Returns:
        bool [M].
    """
    size = int(groups[-1]) + 1
    quota = torch.zeros(size, dtype=torch.long, device=groups.device).index_add(0, groups, chosen.long())
    members = torch.zeros_like(quota).index_add(0, groups, torch.ones_like(groups))
    by_confidence = confidence.argsort(descending=True, stable=True)
    ranking = by_confidence[groups[by_confidence].argsort(stable=True)]  # by group, then by confidence
    first = members.cumsum(0) - members
    rank = torch.empty_like(groups)
    rank[ranking] = torch.arange(groups.numel(), device=groups.device) - first[groups[ranking]]
    return rank < quota[groups]


def _draw_counts(expected_gaps: Tensor, fraction: float, noise: _RowNoise, kind: str) -> Tensor:
    """int64 [T]: masks that each gap receives, of mean expected_gaps times fraction."""
    y = expected_gaps.double()
    uniforms = noise(COUNT_NOISE)
    if kind == "poisson":
        return poisson_quantile(uniforms, y * fraction)
    whole = y.floor()
    trials = whole + (noise(ROUNDING_NOISE) < y - whole)
    return binomial_quantile(uniforms, trials, fraction)


def binomial_quantile(uniforms: Tensor, trials: Tensor, probability: float) -> Tensor:
    """Binomial(trials, probability) by inverse distribution function: float64 [T] -> int64 [T]."""
    counts = torch.zeros_like(trials, dtype=torch.long)
    rows = (trials > 0).nonzero().squeeze(-1)
    if rows.numel() and probability > 0:
        n = trials[rows, None]
        p = torch.tensor(probability, dtype=torch.float64, device=trials.device)
        k = torch.arange(int(n.max()) + 1, dtype=torch.float64, device=trials.device).clamp(max=n)
        log_pmf = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
        cdf = (log_pmf + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p)).exp().cumsum(-1)
        counts[rows] = torch.minimum((uniforms[rows, None] > cdf).sum(-1), trials[rows].long())
    return counts


def poisson_quantile(uniforms: Tensor, means: Tensor) -> Tensor:
    """Poisson(means) by inverse distribution function: float64 [T] -> int64 [T]."""
    counts = torch.zeros_like(means, dtype=torch.long)
    rows = (means > 0).nonzero().squeeze(-1)
    if rows.numel():
        mean = means[rows, None]
        most = float(mean.max())
        k = torch.arange(int(most + 12 * most**0.5 + 40), dtype=torch.float64, device=means.device)
        cdf = (torch.xlogy(k, mean) - mean - torch.lgamma(k + 1)).exp().cumsum(-1)
        counts[rows] = (uniforms[rows, None] > cdf).sum(-1)
    return counts


def _insert(state: _State, counts: Tensor, mask_token_id: int, limit: int) -> _State:
    """Inserts counts[i] masks before row i, none into closed gaps; what exceeds the length limit is cut evenly."""
    packed = state.packed
    assert packed.kept is not None and packed.closed is not None
    counts = counts.masked_fill(packed.closed, 0)
    sequence = packed.sequence_ids
    wanted = torch.zeros_like(packed.lengths).index_add(0, sequence, counts)
    room = (limit - (packed.lengths - 1)).clamp(min=0)
    cut = wanted > room
    if bool(cut.any()):
        # Of a sequence's insertions in order, every (wanted / room)-th survives.
        through = counts.cumsum(0)
        before_sequence = (wanted.cumsum(0) - wanted)[sequence]
        through, before = through - before_sequence, through - counts - before_sequence
        share = torch.minimum(room, wanted)[sequence]
        total = wanted[sequence].clamp(min=1)
        counts = through * share // total - before * share // total
        wanted = torch.minimum(room, wanted)
    rows = torch.arange(counts.numel(), device=counts.device) + counts.cumsum(0)
    size = counts.numel() + int(counts.sum())
    grown = PackedSequences(
        tokens=packed.tokens.new_full((size,), mask_token_id).index_put((rows,), packed.tokens),
        cu_seqlens=cumulative_lengths(packed.lengths + wanted),
        kept=torch.zeros(size, dtype=torch.bool, device=counts.device).index_put((rows,), packed.kept),
        closed=torch.zeros(size, dtype=torch.bool, device=counts.device).index_put((rows,), packed.closed),
    )
    return _State(grown, state.truncated | cut)
