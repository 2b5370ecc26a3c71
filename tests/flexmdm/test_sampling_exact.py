"""The sampler driven by the exact model reproduces the data, the closer the more steps it takes.

The Monte-Carlo floor of 2,000 runs (total variation of as many draws from the data itself) is .015 to .022; a distance
measured by them has a standard error below .011. `python -m tests.exact_report` prints figures at more steps and runs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from retrofit.flexmdm import Geometric, Linear, Power, Schedules
from retrofit.flexmdm.sampling import Prompt, sample_flexmdm
from tests.exact_model import ExactModel, FiniteData, clean, spell
from tests.exact_runs import LAWS, SCHEDULES, monte_carlo_floor, sample_law

RUNS = 2000

# (law, counts): largest total variation at 8 and at 64 steps; at 64 also of the lengths.
BOUNDS = {
    ("variable lengths", "binomial"): (0.18, 0.05, 0.04),
    ("variable lengths", "poisson"): (0.21, 0.07, 0.06),
    ("repeated tokens", "binomial"): (0.30, 0.08, 0.05),
    ("repeated tokens", "poisson"): (0.33, 0.10, 0.06),
    ("two-mode lengths", "binomial"): (0.36, 0.08, 0.06),
    ("two-mode lengths", "poisson"): (0.43, 0.13, 0.10),
    ("kept inside", "binomial"): (0.06, 0.04, 0.03),
    ("kept inside", "poisson"): (0.11, 0.05, 0.04),
}


@pytest.mark.parametrize(("name", "counts"), BOUNDS)
def test_samples_approach_the_data_as_steps_grow(name: str, counts: str) -> None:
    data = FiniteData(LAWS[name])
    model = ExactModel(data, SCHEDULES["linear"])
    coarse, fine = (sample_law(model, data, runs=RUNS, steps=steps, counts=counts, seed=1) for steps in (8, 64))
    at_8, at_64, lengths_at_64 = BOUNDS[name, counts]
    assert coarse.distance < at_8
    assert fine.distance < at_64 and fine.length_distance < lengths_at_64
    floor = monte_carlo_floor(data, RUNS)
    assert fine.distance < max(0.4 * coarse.distance, 2 * floor)
    assert fine.impossible < max(0.4 * coarse.impossible, 0.01)


def test_binomial_counts_meet_fewer_impossible_states_than_poisson() -> None:
    data = FiniteData(LAWS["two-mode lengths"])
    model = ExactModel(data, SCHEDULES["linear"])
    binomial, poisson = (
        sample_law(model, data, runs=RUNS, steps=16, counts=counts, seed=2) for counts in ("binomial", "poisson")
    )
    assert binomial.impossible < poisson.impossible - 0.03
    assert binomial.distance < poisson.distance - 0.03


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_binomial_counts_are_exact_where_every_gap_is_known(steps: int) -> None:
    data = FiniteData({"AbCdA": 0.5, "AB_CdA": 0.5})
    model = ExactModel(data, SCHEDULES["linear"])
    binomial, poisson = (
        sample_law(model, data, runs=500, steps=steps, counts=counts, seed=3) for counts in ("binomial", "poisson")
    )
    assert binomial.distance == pytest.approx(0, abs=1e-12)
    assert poisson.impossible > 0.02


# Training and sampling schedules; the model is told alpha alone.
WARPS = {
    "geometric": (SCHEDULES["geometric"], None),
    "power": (SCHEDULES["power"], None),
    "linear, sampled as power": (SCHEDULES["linear"], SCHEDULES["power"]),
    "linear, sampled as geometric": (SCHEDULES["linear"], SCHEDULES["geometric"]),
    "power, sampled as linear": (SCHEDULES["power"], SCHEDULES["linear"]),
    "geometric, sampled as linear": (SCHEDULES["geometric"], SCHEDULES["linear"]),
    "linear, unmasked geometrically": (SCHEDULES["linear"], Schedules(Linear(), Geometric())),
    "linear, inserted early": (SCHEDULES["linear"], Schedules(Power(2.9), Linear())),
}


@pytest.mark.parametrize("warp", WARPS.values(), ids=WARPS)
def test_every_schedule_gives_the_same_law(warp: tuple[Schedules, Schedules | None]) -> None:
    trained, sampled = warp
    for name, bound in (("two-mode lengths", 0.075), ("kept inside", 0.04)):
        data = FiniteData(LAWS[name])
        model = ExactModel(data, trained)
        assert sample_law(model, data, runs=RUNS, steps=64, schedules=sampled, seed=1).distance < bound


def test_closing_step_restores_what_is_certain_to_be_missing() -> None:
    """Insertion ends with 30 % of the tokens missing, which lie in gaps that are known once no mask is left."""
    data = FiniteData({"abcdef": 1.0})
    early = replace(SCHEDULES["linear"], alpha_end=0.7)
    samples = sample_flexmdm(ExactModel(data, early), [Prompt([])] * 400, steps=300, seed=4)
    complete = [s for s in samples if s.token_ids == [*data.sequences[0].tokens]]
    assert len(complete) > 0.97 * len(samples)


def test_closing_step_leaves_an_uncertain_gap_as_it_is() -> None:
    """An open hole that is filled in 40 % of the data: after alpha_end half of that is lost, and is not guessed at."""
    data = FiniteData({"A_B": 0.6, "AcB": 0.4})
    early = replace(SCHEDULES["linear"], alpha_end=0.5)
    law = sample_law(ExactModel(data, early), data, runs=4000, steps=64, seed=5)
    assert law.impossible < 0.01
    assert law.distance == pytest.approx(0.2, abs=0.025)


def test_prompts_are_kept_and_closed_gaps_stay_empty() -> None:
    data = FiniteData(LAWS["kept inside"])
    x = clean("AB_C")
    prompt = Prompt(x.tokens, x.open_gaps)
    for sample in sample_flexmdm(ExactModel(data, SCHEDULES["linear"]), [prompt] * 200, steps=32, seed=6):
        name = spell(sample.token_ids, sample.kept)
        assert name.startswith("AB") and name.endswith("C")
        assert "".join(letter for letter in name if letter.isupper()) == "ABC"
