"""Corruption and loss against the exact model: its Monte-Carlo loss is the minimum that numerical integration gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from retrofit.flexmdm import FlexMDMConfig, Geometric, Linear, PackedSequences, Power, Schedules
from retrofit.flexmdm.schedules import Schedule
from retrofit.objective import FlexMDMObjective, corrupt, flexmdm_loss
from tests.exact_model import MASK, PAD, ExactModel, ExactOutput, FiniteData, enumerate_states, minimum_loss
from tests.exact_runs import LAWS, SCHEDULES, Estimate, ExactDraws

# Two draws a stratum: the standard errors are .002 to .016 nats for each term, .3 to 3 % of it.
STRATA = 2**16
LARGEST_ERROR = 0.016


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_monte_carlo_loss_equals_the_integrated_minimum(law: dict[str, float], schedules: Schedules) -> None:
    data = FiniteData(law)
    draws = ExactDraws(data, schedules, strata=STRATA).losses()
    for values, least in zip((draws.unmasking, draws.insertion), minimum_loss(data, schedules), strict=True):
        estimate = Estimate.of_pairs(values)
        assert estimate.error < LARGEST_ERROR
        assert abs(estimate.mean - least) < 3 * estimate.error


def test_geometric_unmasking_has_its_minimum_too() -> None:
    schedules = Schedules(Linear(), Geometric(), alpha_end=0.99)
    data = FiniteData(LAWS["variable lengths"])
    draws = ExactDraws(data, schedules, strata=STRATA).losses()
    for values, least in zip((draws.unmasking, draws.insertion), minimum_loss(data, schedules), strict=True):
        estimate = Estimate.of_pairs(values)
        assert estimate.error < LARGEST_ERROR
        assert abs(estimate.mean - least) < 3 * estimate.error


def test_hazards_are_those_of_the_schedule_up_to_their_guard_and_finite_at_the_end() -> None:
    """1 - (1 - t)^2.89 rounds to 1 well before t does: a quotient of differences would be infinite there."""
    left = torch.tensor([1e-2, 1e-4, 3e-6, 1.1e-6], dtype=torch.float64)
    for exponent in (1.7, 2.89):
        schedules = Schedules(Power(exponent), Power(exponent), alpha_end=1.0)
        torch.testing.assert_close(schedules.unmasking_hazard(1 - left), exponent / left, rtol=1e-9, atol=0)
        assert schedules.unmasking_hazard(torch.ones(1)).isfinite().all()


SHORT_LAWS = {
    "one token": {"": 0.15, "a": 0.35, "b": 0.3, "c": 0.2},
    "one hole": {"A_B": 0.3, "AcB": 0.5, "AdB": 0.2},
}
PAIRS = {
    "linear": (Linear(), Linear()),
    "power": (Power(1.7), Power(2.89)),
    "linear, quadratic": (Linear(), Power(2.0)),
}


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("law", SHORT_LAWS.values(), ids=SHORT_LAWS)
def test_least_loss_is_the_entropy_where_at_most_one_token_is_written(
    law: dict[str, float], pair: tuple[Schedule, Schedule]
) -> None:
    data = FiniteData(law)
    missing = [data.entropy - sum(minimum_loss(data, Schedules(*pair, alpha_end=1 - e))) for e in (1e-2, 1e-4, 1e-6)]
    assert missing == sorted(missing, reverse=True)
    assert missing[-1] == pytest.approx(0, abs=5e-5)
    estimate = Estimate.of_pairs(ExactDraws(data, Schedules(*pair, alpha_end=1 - 1e-6), strata=STRATA).losses().total)
    assert estimate.error < LARGEST_ERROR
    assert abs(estimate.mean - data.entropy) < 3 * estimate.error


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
def test_least_loss_of_one_token_is_the_information_gained_between_the_ends(schedules: Schedules) -> None:
    """Also where tokens are lost at alpha_end, and where the geometric schedule starts above 0."""
    data = FiniteData(SHORT_LAWS["one token"])
    states = enumerate_states(data)
    bounds = states.packed.cu_seqlens.tolist()
    names = [tuple(states.packed.tokens[a:b].tolist()) for a, b in zip(bounds, bounds[1:], strict=False)]

    def remaining_entropy(t: float) -> float:
        joint = states.probabilities(data, schedules, t).tolist()
        marginal = {name: sum(p for p, n in zip(joint, names, strict=True) if n == name) for name in names}
        return -sum(p * math.log(p / marginal[n]) for p, n in zip(joint, names, strict=True) if p > 0)

    gained = remaining_entropy(0.0) - remaining_entropy(1.0)
    assert sum(minimum_loss(data, schedules)) == pytest.approx(gained, abs=2e-5)


Perturbation = Callable[[ExactOutput, PackedSequences], ExactOutput]


def tokens(change: Callable[[Tensor], Tensor]) -> Perturbation:
    return lambda output, packed: replace(output, logits=change(output.logits))


def gaps(change: Callable[[Tensor, PackedSequences], Tensor]) -> Perturbation:
    return lambda output, packed: replace(output, expected_gaps=change(output.expected_gaps, packed))


PERTURBATIONS = {
    "tokens sharper": tokens(lambda logits: 2.0 * logits.clamp_min(-12.0)),
    "tokens flatter": tokens(lambda logits: 0.5 * logits.clamp_min(-12.0)),
    "one token favoured": tokens(lambda logits: logits + 0.7 * (torch.arange(8) == 3)),
    "uniform mixed in": tokens(lambda logits: (0.8 * logits.softmax(-1) + 0.2 / 6).log()),
    "gaps larger": gaps(lambda y, packed: 1.4 * y),
    "gaps smaller": gaps(lambda y, packed: 0.7 * y),
    "gaps never empty": gaps(lambda y, packed: y + 0.05),
    "gaps blurred": gaps(lambda y, packed: y * torch.exp(0.6 * torch.sin(3.0 * packed.positions + packed.tokens))),
    "second gap favoured": gaps(lambda y, packed: y * torch.where(packed.positions == 1, 1.6, 1.0)),
    "slot's gap smaller": gaps(lambda y, packed: y * torch.where(packed.tokens == PAD, 0.6, 1.0)),
}


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_perturbation_raises_the_loss(law: dict[str, float], schedules: Schedules) -> None:
    data = FiniteData(law)
    draws = ExactDraws(data, schedules, strata=2**14)
    exact = draws.losses().total
    for name, perturb in PERTURBATIONS.items():
        rise = Estimate.of_pairs(draws.losses(perturb(draws.output, draws.packed)).total - exact)
        assert rise.mean > 3 * rise.error, f"{name}: {rise}"


def test_gaps_that_are_closed_do_not_enter_the_loss() -> None:
    data = FiniteData({"AbC": 0.5, "A_C": 0.5})
    draws = ExactDraws(data, SCHEDULES["linear"], strata=256)
    outer = gaps(lambda y, packed: torch.where((packed.positions == 0) | (packed.tokens == PAD), 9.0, y))
    changed = outer(draws.output, draws.packed)
    assert not torch.equal(changed.expected_gaps, draws.output.expected_gaps)
    assert torch.equal(draws.losses(changed).total, draws.losses().total)


@dataclass(frozen=True)
class _Documents:
    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    open_gaps: Tensor


def test_training_sums_equal_the_dense_loss_on_the_same_noise() -> None:
    data = FiniteData(LAWS["kept inside"])
    config = FlexMDMConfig(vocab_size=8, mask_token_id=MASK, pad_token_id=PAD, eos_token_id=PAD, d_model=8, n_heads=1)
    index = torch.arange(len(data.sequences)).repeat(64)
    documents = _Documents(*(x[index] for x in data.padded))
    model = ExactModel(data, config.schedules)
    ordinals = torch.arange(len(documents.lengths))
    t = torch.linspace(0.2, 0.95, len(ordinals), dtype=torch.float64)
    batch = FlexMDMObjective(config, seed=3).prepare(documents, ordinals, t).micro_batch(range(len(ordinals)))
    terms = FlexMDMObjective(config, seed=3).loss_terms(model, batch)
    corrupted = corrupt(
        documents.tokens,
        documents.lengths,
        t,
        kept=documents.kept,
        schedules=config.schedules,
        mask_token_id=MASK,
        pad_token_id=PAD,
        open_gaps=documents.open_gaps,
        key=(3, ordinals),
    )
    output = model(packed=batch.packed, timesteps=t)
    logits = torch.zeros(*corrupted.tokens.shape, 8, dtype=torch.float64)
    logits[corrupted.masked] = output.logits
    expected = torch.zeros(corrupted.gaps.shape, dtype=torch.float64)
    expected[batch.packed.sequence_ids, batch.packed.positions] = output.expected_gaps
    loss = flexmdm_loss(logits, expected, corrupted, t, schedules=config.schedules)
    assert loss.unmasking.sum() > 0 and loss.insertion.sum() > 0
    torch.testing.assert_close(terms["unmasking"], loss.unmasking)
    torch.testing.assert_close(terms["insertion"], loss.insertion)
