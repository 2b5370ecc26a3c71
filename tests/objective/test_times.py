"""The density of t leaves every mean over uniform t what it is, by quadrature and against the exact model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from retrofit.flexmdm import FlexMDMConfig, Geometric, Linear, Power, Schedules
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.objective import FlexMDMObjective
from retrofit.objective.times import IMPORTANCE, UNIFORM, TimeDensity, bin_edges, importance_density, mask_probability
from tests.exact_model import MASK, PAD, ExactModel, FiniteData, minimum_loss
from tests.exact_model import mask_probability as integrated_mask_probability
from tests.exact_runs import LAWS, SCHEDULES, Estimate

STEEP = "too steep for float64"
ALL_SCHEDULES = {
    **SCHEDULES,
    "geometric, both": Schedules(Geometric(), Geometric()),
    "a jump at 0": Schedules(Geometric(sigma_max=2.0), Linear()),
    "steep": Schedules(Power(9.0), Power(2.0), alpha_end=1.0),
    STEEP: Schedules(Linear(), Power(200.0)),
    "insertion ends early": Schedules(Linear(), Linear(), alpha_end=0.3),
}
each_schedules = pytest.mark.parametrize("schedules", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)


def quadrature(density: TimeDensity) -> tuple[Tensor, Tensor]:
    """Points u and weights of Gauss-Legendre quadrature over (0, 1), in each bin of the density."""
    x, w = np.polynomial.legendre.leggauss(4)
    width = density.cumulative.diff()[:, None]
    u = density.cumulative[:-1, None] + width * torch.from_numpy((x + 1) / 2)
    return u.flatten(), (width * torch.from_numpy(w / 2)).flatten()


@each_schedules
def test_weighted_means_are_integrals_over_uniform_t(schedules: Schedules) -> None:
    density = importance_density(schedules)
    u, measure = quadrature(density)
    t, weights = density.draw(u)
    for power in range(6):
        assert float((measure * weights * t**power).sum()) == pytest.approx(1 / (power + 1), abs=1e-12)
    assert float((measure * weights * -torch.log1p(-t)).sum()) == pytest.approx(1, abs=1e-5)
    heights, edges = 1 / weights.view(-1, 4), density.edges
    assert (heights == heights[:, :1]).all()
    assert float((heights[:, 0] * edges.diff()).sum()) == pytest.approx(1, abs=1e-12)
    assert ((t.view(-1, 4) > edges[:-1, None]) & (t.view(-1, 4) < edges[1:, None])).all()


@each_schedules
def test_t_rises_with_u_inside_the_interval_and_weights_are_bounded(schedules: Schedules) -> None:
    least = 2.0**-53
    ends = torch.tensor([least, 1 - least], dtype=torch.float64)
    density = importance_density(schedules)
    u = torch.cat([ends, density.cumulative[1:-1], keyed_uniform(0, torch.arange(4096))]).sort().values
    t, weights = density.draw(u)
    assert (t.diff() >= 0).all() and (t > 0).all() and (t < 1).all()
    assert (weights > 0).all() and (weights < 1 / (1 - IMPORTANCE) + 1e-9).all()


def test_uniform_leaves_u_as_it_is() -> None:
    u = keyed_uniform(0, torch.arange(4096))
    t, weights = UNIFORM.draw(u)
    assert torch.equal(t, u) and torch.equal(weights, torch.ones_like(u))


@pytest.mark.parametrize("name", sorted(ALL_SCHEDULES.keys() - {STEEP}))  # for which the guess is a rough one
def test_probability_of_a_mask_is_that_of_the_interpolant(name: str) -> None:
    schedules = ALL_SCHEDULES[name]
    edges = bin_edges()
    found = mask_probability(schedules, edges)
    middle = (edges[1:] + edges[:-1]) / 2
    for k in (12, 30, 60, 120, 240):  # t from .5 to 1 - 2e-6
        assert float(found[k]) == pytest.approx(integrated_mask_probability(schedules, float(middle[k])), rel=0.01)


@dataclass(frozen=True)
class Documents:
    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    open_gaps: Tensor


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("name", ["two-mode lengths", "kept inside"])
def test_training_loss_of_the_exact_model_is_the_integrated_minimum(name: str, schedules: Schedules) -> None:
    """By the objective that training calls, two draws of t a stratum."""
    data, strata = FiniteData(LAWS[name]), 2**15
    config = FlexMDMConfig(
        vocab_size=8, mask_token_id=MASK, pad_token_id=PAD, eos_token_id=PAD, d_model=8, n_heads=1,
        insertion_schedule=schedules.insertion.to_dict(), unmasking_schedule=schedules.unmasking.to_dict(),
    )  # fmt: skip
    assert config.schedules == schedules
    objective = FlexMDMObjective(config, 0, importance_density(schedules))
    ordinals = torch.arange(2 * strata)
    documents = Documents(*(x[data.draw(keyed_uniform(0, 102, ordinals))] for x in data.padded))
    u = (ordinals % strata + keyed_uniform(0, 101, ordinals)) / strata
    batch = objective.prepare(documents, ordinals, u).micro_batch(range(2 * strata))
    terms = objective.loss_terms(ExactModel(data, schedules), batch)
    for values, least in zip(terms.values(), minimum_loss(data, schedules), strict=True):
        estimate = Estimate.of_pairs(values.view(2, -1))
        assert estimate.error < 0.02
        assert abs(estimate.mean - least) < 3 * estimate.error
