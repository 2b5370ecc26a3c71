"""The exact model against brute force: every deletion and mask pattern of every sequence, summed state by state."""

from __future__ import annotations

import math

import pytest
import torch

from retrofit.flexmdm.packing import PackedSequences, pack
from retrofit.flexmdm.schedules import Geometric, Linear, Power, Schedules
from tests.exact_model import (
    MASK,
    PAD,
    ExactModel,
    FiniteData,
    clean,
    enumerate_states,
    mask_probability,
    minimum_loss,
    spell,
    total_variation,
)

LAWS = {
    "lengths": {"": 0.1, "a": 0.2, "ab": 0.3, "bab": 0.4},
    "repeats": {"aa": 0.3, "aab": 0.3, "abab": 0.2, "bbbb": 0.2},
    "kept_inside": {"aBc": 0.3, "aaB": 0.2, "Ba": 0.2, "bB_": 0.2, "_B": 0.1},
    "waypoints": {"A_B": 0.25, "AaB": 0.25, "AbaB": 0.2, "AB": 0.1, "AbAaB": 0.2},
}
SCHEDULES = {
    "linear": Schedules(Linear(), Linear()),
    "power": Schedules(Power(1.7), Power(2.89)),
    "geometric": Schedules(Geometric(), Linear()),
    "geometric twice": Schedules(Linear(), Geometric(), alpha_end=0.9),
}


@pytest.mark.parametrize("t", [0.0, 0.2, 0.7, 0.97])
@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_posterior_equals_brute_force_over_all_patterns(law: dict[str, float], schedules: Schedules, t: float) -> None:
    data = FiniteData(law)
    states = enumerate_states(data)
    probabilities = states.probabilities(data, schedules, t)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-9)
    packed = states.packed
    output = ExactModel(data, schedules)(
        packed=packed, timesteps=torch.full((packed.num_sequences,), t, dtype=torch.float64)
    )
    assert packed.kept is not None and packed.closed is not None
    is_mask = packed.tokens == MASK
    mask_index = is_mask.cumsum(0) - 1
    groups: dict[tuple[int, ...], list[int]] = {}
    bounds = packed.cu_seqlens.tolist()
    code = (packed.tokens * 4 + packed.kept * 2 + packed.closed).tolist()
    for s in range(packed.num_sequences):
        groups.setdefault(tuple(code[bounds[s] : bounds[s + 1]]), []).append(s)
    assert len(groups) < packed.num_sequences
    for members in groups.values():
        weight = probabilities[members] / probabilities[members].sum()
        if not torch.isfinite(weight).all():
            continue  # at t = 0 only kept tokens are there
        for row in range(bounds[members[0] + 1] - bounds[members[0]]):
            rows = torch.tensor([bounds[s] + row for s in members])
            gap = (weight * states.gaps[rows]).sum()
            torch.testing.assert_close(output.expected_gaps[rows], gap.expand(len(members)), rtol=1e-9, atol=1e-12)
            if is_mask[rows[0]]:
                masks = mask_index[rows]
                tokens = torch.zeros(8, dtype=torch.float64).index_add(0, states.targets[masks], weight)
                torch.testing.assert_close(output.logits[masks[0]].exp(), tokens, rtol=1e-9, atol=1e-12)


def test_mask_probability_equals_its_closed_forms() -> None:
    for t in (0.0, 0.3, 0.9, 0.999):
        s = 1 - t
        linear = Schedules(Linear(), Linear(), alpha_end=1.0)
        assert mask_probability(linear, t) == pytest.approx(-s * math.log(s), abs=1e-12)
        a, b = 1.7, 2.89
        power = Schedules(Power(a), Power(b), alpha_end=1.0)
        assert mask_probability(power, t) == pytest.approx(a / (a - b) * (s**b - s**a), abs=1e-12)


def test_mask_probability_agrees_with_hitting_times_for_every_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(2, 400_000, generator=generator, dtype=torch.float64)
    for schedules in SCHEDULES.values():
        inserted, unmasked = schedules.hitting_times(u[0], u[1])
        for t in (0.0, 0.3, 0.8, 0.999):
            frequency = ((inserted <= t) & (unmasked > t)).double().mean().item()
            error = math.sqrt(max(frequency * (1 - frequency), 1e-6) / u.shape[1])
            assert mask_probability(schedules, t) == pytest.approx(frequency, abs=4 * error)


@pytest.mark.parametrize("schedules", SCHEDULES.values(), ids=SCHEDULES)
def test_integrated_minimum_does_not_depend_on_the_quadrature(schedules: Schedules) -> None:
    data = FiniteData(LAWS["waypoints"])
    coarse = minimum_loss(data, schedules, panels=4, nodes=10)
    fine = minimum_loss(data, schedules, panels=7, nodes=16)
    assert coarse == pytest.approx(fine, abs=2e-5)


def test_impossible_states_are_answered_and_counted() -> None:
    model = ExactModel(FiniteData({"a": 0.5, "b": 0.25, "": 0.25}), SCHEDULES["linear"])
    packed = pack([[MASK, MASK], [MASK]], slot=PAD)
    output = model(packed=packed, timesteps=torch.tensor([0.5, 0.5]))
    assert (model.impossible, model.answered) == (1, 2)
    assert output.expected_gaps.tolist() == [0.0] * 5
    assert output.logits.exp()[:, 2].tolist() == pytest.approx([2 / 3] * 3)
    assert not model.embeds([MASK, MASK], [False, False]) and model.embeds([MASK], [False])


def test_flags_that_are_needed_have_to_be_told() -> None:
    model = ExactModel(FiniteData({"Ab": 1.0}), SCHEDULES["linear"])
    with pytest.raises(ValueError, match="which tokens are kept"):
        model(packed=pack([[2]], slot=PAD), timesteps=torch.zeros(1))


def test_untold_closed_gaps_mix_the_holes() -> None:
    """One hole in either of two places: told which, the gap is 1 there; untold, one half in both."""
    model = ExactModel(FiniteData({"AcBA": 0.5, "ABcA": 0.5}), SCHEDULES["linear"])
    told = pack([[2, 3, 2]], slot=PAD)
    kept = torch.tensor([True, True, True, False])
    closed = torch.tensor([True, False, True, True])
    time = torch.tensor([0.1])
    untold = PackedSequences(told.tokens, told.cu_seqlens, kept)
    assert model(packed=untold, timesteps=time).expected_gaps.tolist() == pytest.approx([0, 0.5, 0.5, 0])
    told = PackedSequences(told.tokens, told.cu_seqlens, kept, closed)
    assert model(packed=told, timesteps=time).expected_gaps.tolist() == pytest.approx([0, 1, 0, 0])


def test_notation_of_the_tests() -> None:
    x = clean("A_Bc")
    assert x.kept == (True, True, False) and x.open_gaps == (False, True, True, True)
    assert clean("").open_gaps == (True,) and clean("AB").open_gaps == (False, False, False)
    assert spell(x.tokens, x.kept) == "ABc"
    assert total_variation({"a": 0.5, "b": 0.5}, ["a", "a", "c", "a"]) == pytest.approx(0.5)
