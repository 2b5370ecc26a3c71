"""The exact FlexMDM of a finite data distribution, the strongest oracle there is: its posterior has a closed form.

A deletable token is deleted at time t with probability 1 - alpha, a mask with m(t), clean with c(t) = alpha - m(t),
independently of all others. So for a clean sequence x1 with d deletable tokens and a state x_t that holds k of them, M
as masks,

    p(x_t | x1) = N(x_t in x1) (1 - alpha)^(d - k) m^M c^(k - M),

where N counts the embeddings of x_t in x1. x_t itself fixes k and M (its kept tokens are marked), so m and c cancel and

    p(x1 | x_t)  is proportional to  p(x1) (1 - alpha)^d N(x_t in x1):

beta does not appear, and N depends on no schedule. An embedding maps the survivors, in order, to positions of x1: a
mask to any deletable token, a clean survivor to an equal deletable one, a kept survivor to an equal kept one, and no
kept token is left out. Where the state says which of its gaps are closed, an open gap of x_t has to cover an open gap
of x1, and a closed one only closed ones. Given x1 all embeddings are equally likely; forward and backward counts over
positions give the token behind each mask and the expected number of tokens in each gap.

Notation of the tests: a letter is a token, "A" is "a" kept, "_" opens the gap where it stands. A gap beside a deletable
token is open, any other gap of a sequence with kept tokens is closed unless opened.

Shape legend: T packed rows, B sequences, M mask rows, V vocabulary, X sequences of the data, L longest of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths
from retrofit.flexmdm.schedules import Geometric, Power, Schedule, Schedules

PAD, MASK, FIRST_LETTER = 0, 1, 2


@dataclass(frozen=True)
class CleanSequence:
    """One sequence of the data: tokens, which of them are kept, and which of its len + 1 gaps are open."""

    tokens: tuple[int, ...]
    kept: tuple[bool, ...]
    open_gaps: tuple[bool, ...]

    def __post_init__(self) -> None:
        for i, kept in enumerate(self.kept):
            if not kept and not (self.open_gaps[i] and self.open_gaps[i + 1]):
                raise ValueError(f"gaps beside the deletable token {i} have to be open")

    @property
    def num_deletable(self) -> int:
        return len(self.tokens) - sum(self.kept)


def clean(text: str) -> CleanSequence:
    """A sequence in the tests' notation, for example "A_Bcd" (see the top of the file)."""
    tokens: list[int] = []
    kept: list[bool] = []
    opened = set()
    for letter in text:
        if letter == "_":
            opened.add(len(tokens))
        else:
            tokens.append(FIRST_LETTER + ord(letter.lower()) - ord("a"))
            kept.append(letter.isupper())
    beside = [not k for k in kept]
    open_gaps = [
        j in opened or not any(kept) or (j > 0 and beside[j - 1]) or (j < len(tokens) and beside[j])
        for j in range(len(tokens) + 1)
    ]
    return CleanSequence(tuple(tokens), tuple(kept), tuple(open_gaps))


def spell(tokens: Sequence[int], kept: Sequence[bool] | None = None) -> str:
    """Letters of token ids, kept ones in upper case, "?" for a mask (gaps are not shown)."""
    letters = ["?" if token == MASK else chr(ord("a") + token - FIRST_LETTER) for token in tokens]
    return "".join(x.upper() if kept is not None and kept[i] else x for i, x in enumerate(letters))


class FiniteData:
    """A data distribution over finitely many sequences.

    Example:
        FiniteData({"ab": 0.5, "a": 0.5})
    """

    def __init__(self, law: Mapping[str, float]) -> None:
        self.sequences = [clean(text) for text in law]
        self.names = [spell(x.tokens, x.kept) for x in self.sequences]
        total = sum(law.values())
        self.probabilities = np.array([p / total for p in law.values()])

    @property
    def law(self) -> dict[str, float]:
        """Probability by spelling; sequences that differ only in their open gaps are one entry."""
        law: dict[str, float] = {}
        for name, p in zip(self.names, self.probabilities, strict=True):
            law[name] = law.get(name, 0.0) + float(p)
        return law

    @property
    def entropy(self) -> float:
        """Nats."""
        return float(-(self.probabilities * np.log(self.probabilities)).sum())

    @property
    def mean_deletable_tokens(self) -> float:
        return float(sum(p * x.num_deletable for p, x in zip(self.probabilities, self.sequences, strict=True)))

    @property
    def has_flags(self) -> bool:
        """Whether any token is kept."""
        return any(any(x.kept) for x in self.sequences)

    @cached_property
    def padded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(tokens [X, L] int64, lengths [X] int64, kept [X, L] bool, open_gaps [X, L + 1] bool), right-padded."""
        size = max(max(len(x.tokens) for x in self.sequences), 1)
        tokens = torch.full((len(self.sequences), size), PAD)
        kept = torch.zeros(len(self.sequences), size, dtype=torch.bool)
        open_gaps = torch.zeros(len(self.sequences), size + 1, dtype=torch.bool)
        for i, x in enumerate(self.sequences):
            n = len(x.tokens)
            tokens[i, :n] = torch.tensor(x.tokens, dtype=torch.int64)
            kept[i, :n] = torch.tensor(x.kept, dtype=torch.bool)
            open_gaps[i, : n + 1] = torch.tensor(x.open_gaps)
        return tokens, torch.tensor([len(x.tokens) for x in self.sequences]), kept, open_gaps

    def draw(self, uniforms: Tensor) -> Tensor:
        """int64 indices of sequences from uniforms in (0, 1), any shape."""
        return torch.searchsorted(torch.from_numpy(self.probabilities).cumsum(0), uniforms).clamp(
            max=len(self.sequences) - 1
        )


@dataclass(frozen=True)
class ExactConfig:
    """What a sampler reads of a model's config."""

    schedules: Schedules
    vocab_size: int
    mask_token_id: int = MASK
    pad_token_id: int = PAD
    max_sequence_length: int = 64
    time_input: str = "alpha"
    mean_deletable_tokens: float = 1.0


@dataclass(frozen=True)
class ExactOutput:
    """logits float64 [M, V]: log posterior of the token at each mask row. expected_gaps float64 [T]."""

    logits: Tensor
    expected_gaps: Tensor


class _Paths:
    """Moves of an embedding through one clean sequence, its positions 1..n between a virtual start 0 and end n + 1."""

    def __init__(self, x: CleanSequence) -> None:
        n = len(x.tokens)
        self.tokens = np.array([-1, *x.tokens, -1])
        self.kept = np.array([False, *x.kept, False])
        self.deletable = np.array([False, *(not k for k in x.kept), False])
        between = np.arange(n + 2)[None, :] - np.arange(n + 2)[:, None] - 1
        allowed, covers_open = np.zeros((n + 2, n + 2), bool), np.zeros((n + 2, n + 2), bool)
        for i in range(n + 2):
            for j in range(i + 1, n + 2):
                allowed[i, j] = not any(x.kept[i : j - 1])
                covers_open[i, j] = any(x.open_gaps[i:j])
        self.between = np.maximum(between, 0).astype(float)
        # By what the state says of the gap: 0 open, 1 closed, 2 nothing.
        self.moves = [m.astype(float) for m in (allowed & covers_open, allowed & ~covers_open, allowed)]

    def _match(self, token: int, kept: bool) -> np.ndarray:
        """float [n + 2]: the positions where a survivor may have come from."""
        if kept:
            return (self.kept & (self.tokens == token)).astype(float)
        return (self.deletable & ((self.tokens == token) | (token == MASK))).astype(float)

    def count(self, tokens: np.ndarray, kept: np.ndarray, gap: np.ndarray, vocab_size: int) -> _Counts:
        """Sums over all embeddings of a state of J survivors (J + 1 gaps, `gap` in {0, 1, 2} as in `moves`)."""
        size = len(self.tokens)
        start, end = np.eye(size)[0], np.eye(size)[-1]
        match = [self._match(token, k) for token, k in zip(tokens, kept, strict=True)] + [end]
        forward = [start]
        for j, m in enumerate(match):
            forward.append((forward[j] @ self.moves[gap[j]]) * m)
        backward = [end]  # reversed: of the last survivor's successor first
        for j in range(len(match) - 1, -1, -1):
            backward.append(self.moves[gap[j]] @ (match[j] * backward[-1]))
        backward = backward[::-1]  # backward[j + 1]: completions after survivor j
        gaps = np.array(
            [forward[j] @ (self.moves[gap[j]] * self.between) @ (m * backward[j + 1]) for j, m in enumerate(match)]
        )
        token_counts = np.zeros((int((tokens == MASK).sum()), vocab_size))
        for row, j in enumerate(np.flatnonzero(tokens == MASK).tolist()):
            np.add.at(token_counts[row], self.tokens[1:-1], (forward[j + 1] * backward[j + 1])[1:-1])
        return _Counts(float(forward[-1][-1]), gaps, token_counts)


@dataclass(frozen=True)
class _Counts:
    embeddings: float
    gaps: np.ndarray  # [J + 1]: tokens in the gap, summed over embeddings
    tokens: np.ndarray  # [masks, V]: embeddings with this token behind the mask


@dataclass
class _Table:
    """Counts of every state met so far; they depend on no schedule, so alpha enters when they are read."""

    states: dict[bytes, int] = field(default_factory=dict)
    embeddings: list[np.ndarray] = field(default_factory=list)  # [X] for each state
    gaps: list[np.ndarray] = field(default_factory=list)  # [rows, X]
    tokens: list[np.ndarray] = field(default_factory=list)  # [masks, X, V]


class ExactModel:
    """The exact posterior as a model: what a FlexMDM trained to perfection on `data` would answer.

    Impossible states (a coarse leap can put two masks into a gap of one) have no posterior. There tokens get the law of
    the data's deletable tokens taken together and all expected gaps are 0, so that the run ends; `impossible` counts
    the sequences answered so, `answered` all. A state that embeds in nothing never leads to one that does, so the runs
    that met one are those whose final sequence embeds in nothing: see `embeds`.

    Args:
        data: the data distribution.
        schedules: of the config; only alpha enters.
        vocab_size: at least the largest token id + 1.
    """

    def __init__(self, data: FiniteData, schedules: Schedules, vocab_size: int = 8) -> None:
        self.data = data
        self.config = ExactConfig(schedules, vocab_size, mean_deletable_tokens=data.mean_deletable_tokens)
        self.impossible = 0
        self.answered = 0
        self._paths = [_Paths(x) for x in data.sequences]
        self._prior = torch.from_numpy(data.probabilities)
        self._num_deletable = torch.tensor([float(x.num_deletable) for x in data.sequences], dtype=torch.float64)
        marginal = np.full(vocab_size, 1e-300)
        for p, x in zip(data.probabilities, data.sequences, strict=True):
            for token, kept in zip(x.tokens, x.kept, strict=True):
                marginal[token] += 0.0 if kept else p
        self._marginal = torch.from_numpy(marginal / marginal.sum())
        self._table = _Table()
        self._stacked: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def eval(self) -> ExactModel:
        """As nn.Module's."""
        return self

    def embeds(self, tokens: Sequence[int], kept: Sequence[bool]) -> bool:
        """Whether a state can be reached from the data."""
        gap = np.full(len(tokens) + 1, 2)
        arrays = np.array(tokens, dtype=np.int64), np.array(kept, dtype=bool)
        return any(paths.count(*arrays, gap, self.config.vocab_size).embeddings > 0 for paths in self._paths)

    def _look_up(self, packed: PackedSequences) -> np.ndarray:
        """int64 [B]: table index of each sequence's state, counted now if it is new."""
        rows = packed.tokens.numpy().astype(np.int64) * 8
        if packed.kept is not None:
            rows += packed.kept.numpy().astype(np.int64) * 4
        elif self.data.has_flags:
            raise ValueError("the exact posterior of data with kept tokens needs to know which tokens are kept")
        rows += 2 if packed.closed is None else packed.closed.numpy().astype(np.int64)
        bounds = packed.cu_seqlens.tolist()
        index = np.empty(packed.num_sequences, np.int64)
        for b in range(packed.num_sequences):
            state = rows[bounds[b] : bounds[b + 1]]
            key = state.tobytes()
            found = self._table.states.get(key)
            index[b] = self._add(key, state) if found is None else found
        return index

    def _add(self, key: bytes, state: np.ndarray) -> int:
        tokens, kept, gap = state[:-1] // 8, (state[:-1] % 8) // 4 == 1, state % 4
        counts = [paths.count(tokens, kept, gap, self.config.vocab_size) for paths in self._paths]
        table = self._table
        table.embeddings.append(np.array([c.embeddings for c in counts]))
        table.gaps.append(np.stack([c.gaps for c in counts], axis=1))
        table.tokens.append(np.stack([c.tokens for c in counts], axis=1))
        table.states[key] = len(table.states)
        self._stacked = None
        return table.states[key]

    def __call__(self, *, packed: PackedSequences, timesteps: Tensor, logit_rows: Tensor | None = None) -> ExactOutput:
        """Posterior at each mask row (in order) and expected gap of each row.

        Args:
            packed: each sequence ends with its slot; `kept` and `closed` as DESIGN's flags (None: not told).
            timesteps: [B], t.
            logit_rows: the mask rows, if given at all.
        """
        index = torch.from_numpy(self._look_up(packed))
        if self._stacked is None:
            table = self._table
            self._stacked = (
                torch.from_numpy(np.stack(table.embeddings)),
                torch.from_numpy(np.concatenate(table.gaps)),
                torch.from_numpy(np.concatenate(table.tokens)),
                torch.tensor([0, *itertools.accumulate(len(x) for x in table.gaps)]),
                torch.tensor([0, *itertools.accumulate(len(x) for x in table.tokens)]),
            )
        embeddings, gaps, tokens, gap_start, token_start = self._stacked
        alpha = self.config.schedules.alpha(timesteps.double())
        weight = self._prior * (1 - alpha)[:, None] ** self._num_deletable  # [B, X]
        total = (weight * embeddings[index]).sum(1)
        possible = total > 0
        self.impossible += int((~possible).sum())
        self.answered += len(index)
        weight = torch.where(possible[:, None], weight / total[:, None], 0.0)

        expected = (gaps[gap_start[index][packed.sequence_ids] + packed.positions] * weight[packed.sequence_ids]).sum(1)
        mask_rows = (packed.tokens == MASK).nonzero().squeeze(1)
        assert logit_rows is None or torch.equal(logit_rows, mask_rows)
        owner = packed.sequence_ids[mask_rows]
        before = torch.nn.functional.pad((packed.tokens == MASK).cumsum(0), (1, 0))
        rank = before[mask_rows] - before[packed.cu_seqlens.long()[owner]]
        posterior = torch.einsum("mxv,mx->mv", tokens[token_start[index][owner] + rank], weight[owner])
        posterior = torch.where(possible[owner][:, None], posterior, self._marginal)
        return ExactOutput(posterior.clamp_min(1e-300).log(), expected)


# ----------------------------------------------------------------------------------------------------
# The minimum of the loss, integrated numerically


def _gauss_legendre(function: Callable[[np.ndarray], np.ndarray], panels: int, nodes: int) -> np.ndarray:
    """Integral over [0, 1], composite: function takes points [P] and returns values [..., P]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    points = ((np.arange(panels)[:, None] + (x + 1) / 2) / panels).ravel()
    return function(points) @ np.tile(w / 2 / panels, panels)


def _tensor(x: np.ndarray | float) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


def _remaining(schedule: Schedule, left: np.ndarray | float) -> np.ndarray:
    """1 - schedule at t = 1 - left, without cancellation near t = 1."""
    if isinstance(schedule, Geometric):
        sigma = schedule.sigma_max**left * schedule.sigma_min ** (1 - np.asarray(left))
        return -np.expm1(-sigma)
    return np.asarray(left) ** (schedule.exponent if isinstance(schedule, Power) else 1.0)


def mask_probability(schedules: Schedules, t: float) -> float:
    """P(a deletable token is a mask at t) = (1 - beta(t)) * integral of d alpha(s) / (1 - beta(s)) over [0, t].

    The geometric schedule's jump at s = 0 is part of the integral; the insertion schedule is cut off at alpha_end.
    """
    insertion, unmasking = schedules.insertion, schedules.unmasking
    if t >= 1 and not isinstance(unmasking, Geometric):
        return 0.0
    end = min(t, float(insertion.inverse(_tensor(schedules.alpha_end))))
    log_left = math.log(max(1 - end, 1e-15))

    def integrand(x: np.ndarray) -> np.ndarray:
        left = np.exp(x * log_left)  # 1 - s
        return insertion.derivative(_tensor(1 - left)).numpy() / _remaining(unmasking, left) * left * -log_left

    jump = float(insertion.value(_tensor(0.0)) / _remaining(unmasking, 1.0))
    return float(_remaining(unmasking, 1 - t)) * (jump + float(_gauss_legendre(integrand, 12, 16)))


@dataclass(frozen=True)
class StateList:
    """All ways in which the data's sequences can be corrupted: S rows, one for each x1 and each assignment of
    deleted / mask / clean to its deletable tokens.

    Attributes:
        packed: the S states, flags told.
        source: int64 [S], index of x1.
        deleted, masks, clean: int64 [S], numbers of deletable tokens.
        gaps: int64 [T], the true gap of each packed row.
        targets: int64 [M], the true token of each mask row.
    """

    packed: PackedSequences
    source: Tensor
    deleted: Tensor
    masks: Tensor
    clean: Tensor
    gaps: Tensor
    targets: Tensor

    def probabilities(self, data: FiniteData, schedules: Schedules, t: float) -> Tensor:
        """float64 [S]: p(x1) times the probability of the assignment at time t."""
        alpha = float(schedules.alpha(_tensor(t)))
        mask = mask_probability(schedules, t)
        prior = torch.from_numpy(data.probabilities)[self.source]
        deleted, masks, clean = (x.double() for x in (self.deleted, self.masks, self.clean))  # float ** int is float32
        return prior * (1 - alpha) ** deleted * mask**masks * max(alpha - mask, 0.0) ** clean


def enumerate_states(data: FiniteData) -> StateList:
    """Every corruption of every sequence of the data (3 to the number of deletable tokens of them)."""
    tokens: list[int] = []
    kept: list[bool] = []
    closed: list[bool] = []
    gaps: list[int] = []
    lengths: list[int] = []
    targets: list[int] = []
    numbers: list[tuple[int, int, int, int]] = []
    for source, x in enumerate(data.sequences):
        choices = [("clean",) if k else ("deleted", "mask", "clean") for k in x.kept]
        for assignment in itertools.product(*choices):
            begin, gap, is_open = len(tokens), 0, x.open_gaps[0]
            for i, fate in enumerate(assignment):
                if fate == "deleted":
                    gap, is_open = gap + 1, is_open or x.open_gaps[i + 1]
                    continue
                tokens.append(MASK if fate == "mask" else x.tokens[i])
                kept.append(x.kept[i])
                gaps.append(gap)
                closed.append(not is_open)
                gap, is_open = 0, x.open_gaps[i + 1]
                if fate == "mask":
                    targets.append(x.tokens[i])
            tokens.append(PAD)
            kept.append(False)
            gaps.append(gap)
            closed.append(not is_open)
            lengths.append(len(tokens) - begin)
            count = [assignment.count(fate) for fate in ("deleted", "mask", "clean")]
            numbers.append((source, count[0], count[1], count[2] - sum(x.kept)))
    packed = PackedSequences(
        torch.tensor(tokens), cumulative_lengths(torch.tensor(lengths)), torch.tensor(kept), torch.tensor(closed)
    )
    source_column, deleted, masks, untouched = torch.tensor(numbers).unbind(1)
    return StateList(
        packed, source_column, deleted, masks, untouched, torch.tensor(gaps), torch.tensor(targets, dtype=torch.int64)
    )


def minimum_loss(
    data: FiniteData, schedules: Schedules, *, panels: int = 6, nodes: int = 12, vocab_size: int = 8
) -> tuple[float, float]:
    """The least value of (L_unmask, L_insert) per sequence, t uniform: the exact model's, integrated over t and states.

    The integral is split where insertion ends, with points that crowd towards it and towards t = 1.
    """
    states = enumerate_states(data)
    model = ExactModel(data, schedules, vocab_size)
    mask_rows = (states.packed.tokens == MASK).nonzero().squeeze(1)
    gap_rows = (~states.packed.closed).nonzero().squeeze(1) if states.packed.closed is not None else None
    assert gap_rows is not None
    g = states.gaps[gap_rows].double()

    def at(t: float) -> np.ndarray:
        time = _tensor(t)
        output = model(packed=states.packed, timesteps=time.expand(states.packed.num_sequences))
        weight = states.probabilities(data, schedules, t)
        nll = -output.logits.gather(1, states.targets[:, None]).squeeze(1)
        y = output.expected_gaps[gap_rows].clamp_min(1e-300)
        phi = y - g + torch.xlogy(g, g / y)
        owner = states.packed.sequence_ids
        return np.array(
            [
                float(schedules.unmasking_hazard(time) * (weight[owner[mask_rows]] * nll).sum()),
                float(schedules.insertion_hazard(time) * (weight[owner[gap_rows]] * phi).sum()),
            ]
        )

    def along(left: np.ndarray, measure: np.ndarray) -> np.ndarray:
        return np.stack([at(1 - s) * w for s, w in zip(left, measure, strict=True)], axis=1)

    end = float(schedules.insertion.inverse(_tensor(schedules.alpha_end)))
    left_at_end = 1 - end if end < 1 else 1.0
    power = 4
    total = _gauss_legendre(
        lambda v: along(left_at_end * v**power, left_at_end * power * v ** (power - 1)), panels, nodes
    )
    if left_at_end < 1:
        rate = math.log(left_at_end)
        total = total + _gauss_legendre(lambda x: along(np.exp(x * rate), -rate * np.exp(x * rate)), panels, nodes)
    return float(total[0]), float(total[1])


def total_variation(law: Mapping[str, float], samples: Sequence[str]) -> float:
    """Half the l1 distance of the samples' frequencies from the law."""
    counts: dict[str, float] = {}
    for sample in samples:
        counts[sample] = counts.get(sample, 0.0) + 1 / len(samples)
    return 0.5 * sum(abs(law.get(x, 0.0) - counts.get(x, 0.0)) for x in {*law, *counts})
