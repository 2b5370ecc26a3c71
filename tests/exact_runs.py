"""Runs of the exact model through the real corruption, loss and sampler, for the tests and the report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from retrofit.flexmdm import Geometric, Linear, Power, Schedules
from retrofit.flexmdm.modeling import add_slots
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.flexmdm.sampling import Prompt, sample_flexmdm
from retrofit.objective import corrupt, flexmdm_loss
from tests.exact_model import MASK, PAD, ExactModel, ExactOutput, FiniteData, spell, total_variation

LAWS = {
    "variable lengths": {"": 0.1, "a": 0.2, "cb": 0.3, "abc": 0.25, "dabc": 0.15},
    "repeated tokens": {"aa": 0.3, "aab": 0.2, "abab": 0.2, "bbbb": 0.2, "aaaaa": 0.1},
    "two-mode lengths": {"a": 0.25, "b": 0.25, "abcabc": 0.3, "cbacba": 0.2},
    "kept inside": {"A_B": 0.2, "AaB": 0.2, "AbaB": 0.15, "AcBC": 0.15, "A_BC": 0.1, "ABcC": 0.1, "ABCdd": 0.1},
}
SCHEDULES = {
    "linear": Schedules(Linear(), Linear()),
    "power": Schedules(Power(1.7), Power(2.89)),
    "geometric": Schedules(Geometric(), Linear()),
}


@dataclass(frozen=True)
class Estimate:
    """A Monte-Carlo mean and its standard error."""

    mean: float
    error: float

    @staticmethod
    def of_pairs(values: Tensor) -> Estimate:
        """From values [2, K]: column k holds two independent draws from stratum k."""
        pairs = values.double()
        return Estimate(float(pairs.mean()), float((pairs[0] - pairs[1]).square().sum().sqrt()) / (2 * pairs.shape[1]))


@dataclass(frozen=True)
class LossDraws:
    """Losses [2, K] of single draws (see `ExactDraws`)."""

    unmasking: Tensor
    insertion: Tensor

    @property
    def total(self) -> Tensor:
        return self.unmasking + self.insertion


class ExactDraws:
    """Corrupted draws of the data on keyed noise, and what the exact model answers.

    With t uniform the loss has infinite variance (hazard squared times P(mask) is not integrable at t = 1), so
    t = 1 - (1 - u)^2 with u stratified, two draws a stratum, and each loss is divided by t's density, 1 / (2 (1 - u)).
    """

    def __init__(self, data: FiniteData, schedules: Schedules, *, strata: int, seed: int = 0) -> None:
        ordinals = torch.arange(2 * strata)
        u = (ordinals % strata + keyed_uniform(seed, 101, ordinals)) / strata
        self.t, self.weight = 1 - (1 - u) ** 2, 2 * (1 - u)
        index = data.draw(keyed_uniform(seed, 102, ordinals))
        tokens, lengths, kept, open_gaps = (x[index] for x in data.padded)
        self.corrupted = corrupt(
            tokens,
            lengths,
            self.t,
            kept=kept,
            schedules=schedules,
            mask_token_id=MASK,
            pad_token_id=PAD,
            open_gaps=open_gaps,
            key=(seed, ordinals),
        )
        c = self.corrupted
        self.packed = add_slots(c.tokens, c.lengths, PAD, kept=c.kept, open_gaps=c.open_gaps)
        self.schedules = schedules
        model = ExactModel(data, schedules)
        self.output = model(packed=self.packed, timesteps=self.t)
        assert model.impossible == 0

    def losses(self, output: ExactOutput | None = None) -> LossDraws:
        """By the real `flexmdm_loss`, of the exact model's answers or of others."""
        output = self.output if output is None else output
        logits = torch.zeros(*self.corrupted.tokens.shape, output.logits.shape[1], dtype=torch.float64)
        logits[self.corrupted.masked] = output.logits
        gaps = torch.zeros(self.corrupted.gaps.shape, dtype=torch.float64)
        gaps[self.packed.sequence_ids, self.packed.positions] = output.expected_gaps
        loss = flexmdm_loss(logits, gaps, self.corrupted, self.t, schedules=self.schedules)
        unmasking, insertion = ((self.weight * x).view(2, -1) for x in (loss.unmasking, loss.insertion))
        return LossDraws(unmasking, insertion)


@dataclass(frozen=True)
class SampledLaw:
    """How samples compare with the data.

    Attributes:
        distance: total variation from the data.
        length_distance: total variation of the lengths alone.
        impossible: share of runs that met an impossible state.
        short: share of other runs that ended off the data, too short.
    """

    distance: float
    length_distance: float
    impossible: float
    short: float


def data_prompts(data: FiniteData, count: int) -> list[Prompt]:
    """Prompts in the data's proportions: what is kept of each sequence, with the gaps that are open at t = 0."""
    index = data.draw((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    prompts = []
    for x in data.sequences:
        opened, gap = [], x.open_gaps[0]
        for i, kept in enumerate(x.kept):
            if kept:
                opened.append(gap)
                gap = x.open_gaps[i + 1]
            else:
                gap = True
        prompts.append(Prompt([token for token, kept in zip(x.tokens, x.kept, strict=True) if kept], [*opened, gap]))
    return [prompts[i] for i in index.tolist()]


def sample_law(model: Any, data: FiniteData, *, runs: int, **settings: Any) -> SampledLaw:
    """Samples prompts of the data by the real sampler and compares with the data.

    Args:
        model: the exact model, or a network.
        settings: of sample_flexmdm.
    """
    samples = sample_flexmdm(model, data_prompts(data, runs), **settings)
    names = [spell(s.token_ids, s.kept) for s in samples]
    oracle = model if isinstance(model, ExactModel) else ExactModel(data, model.config.schedules)
    verdict = {name: oracle.embeds(s.token_ids, s.kept) for name, s in zip(names, samples, strict=True)}
    lengths: dict[str, float] = {}
    for name, p in data.law.items():
        lengths[str(len(name))] = lengths.get(str(len(name)), 0.0) + p
    return SampledLaw(
        distance=total_variation(data.law, names),
        length_distance=total_variation(lengths, [str(len(name)) for name in names]),
        impossible=sum(not verdict[name] for name in names) / runs,
        short=sum(verdict[name] and name not in data.law for name in names) / runs,
    )


def monte_carlo_floor(data: FiniteData, runs: int, repeats: int = 200) -> float:
    """Mean total variation of `runs` draws from the data itself."""
    generator = torch.Generator().manual_seed(0)
    law = torch.tensor(list(data.law.values()), dtype=torch.float64)
    counts = torch.stack(
        [
            torch.multinomial(law, runs, replacement=True, generator=generator).bincount(minlength=len(law))
            for _ in range(repeats)
        ]
    )
    return float(0.5 * (counts / runs - law).abs().sum(1).mean())


def distance_error(distance: float, runs: int) -> float:
    """A bound on the standard error of a measured total variation (it is a probability of one event, estimated)."""
    return math.sqrt(max(distance * (1 - distance), 1 / runs) / runs)
