import math

import pytest
import torch

from retrofit.flexmdm import Geometric, Linear, Power, Schedules
from retrofit.flexmdm.schedules import Schedule, schedule_from_dict

SCHEDULES = [Linear(), Power(1.7), Power(2.89), Geometric()]
INNER = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_derivative_is_the_slope_of_the_value(schedule: Schedule) -> None:
    h = 1e-6
    slope = (schedule.value(INNER + h) - schedule.value(INNER - h)) / (2 * h)
    assert torch.allclose(schedule.derivative(INNER), slope, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_hazard_is_the_logarithmic_slope_of_survival(schedule: Schedule) -> None:
    h = 1e-6
    slope = (torch.log1p(-schedule.value(INNER - h)) - torch.log1p(-schedule.value(INNER + h))) / (2 * h)
    assert torch.allclose(schedule.hazard(INNER), slope, rtol=1e-5)
    assert schedule.hazard(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_inverse_undoes_the_value(schedule: Schedule) -> None:
    assert torch.allclose(schedule.inverse(schedule.value(INNER)), INNER, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_truncated_inverse_has_the_truncated_law(schedule: Schedule) -> None:
    start = torch.tensor(0.3, dtype=torch.float64)
    hits = schedule.truncated_inverse(INNER, start)
    begin = schedule.value(start)
    hit = hits.isfinite()
    assert (hits >= start).all()
    assert torch.allclose((schedule.value(hits[hit]) - begin) / (1 - begin), INNER[hit], atol=1e-12)
    assert schedule.truncated_inverse(torch.tensor(0.5), torch.tensor(math.inf)) == math.inf


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_survival_is_exact_where_one_minus_the_value_is_not(schedule: Schedule) -> None:
    late = torch.tensor(1 - 2.0**-20, dtype=torch.float32)
    assert schedule.survival(late) > 0 and schedule.survival(late).dtype == torch.float64
    assert torch.allclose(schedule.survival(INNER), 1 - schedule.value(INNER), rtol=1e-9)
    assert torch.allclose(schedule.inverse_survival(schedule.survival(late)), late.double(), rtol=0, atol=1e-12)


def test_geometric_keeps_its_published_ends() -> None:
    ends = Geometric().value(torch.tensor([0.0, 1.0]))
    assert ends[0] == pytest.approx(4.54e-5, rel=1e-3) and ends[1] == pytest.approx(0.990, abs=1e-4)
    # Below its start a token is there from the beginning; above its end it is never inserted.
    assert Geometric().inverse(torch.tensor([1e-6, 0.995])).tolist() == [0.0, math.inf]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_json_form_reads_back(schedule: Schedule) -> None:
    assert schedule_from_dict(schedule.to_dict()) == schedule


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "cosine"}, "must be one of linear, power, geometric"),
        ({}, "must be one of"),
        ("linear", "must be one of"),
        ({"type": "power"}, "needs exponent"),
        ({"type": "power", "exponent": 0.5}, "at least 1"),
        ({"type": "power", "exponent": "2"}, "must be a number"),
        ({"type": "power", "power": 2}, "unknown parameter `power`"),
        ({"type": "geometric", "sigma_min": 20.0}, "sigma_min"),
    ],
)
def test_a_bad_specification_is_named(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule_from_dict(spec)


def test_insertion_ends_at_alpha_end_and_unmasking_does_not() -> None:
    schedules = Schedules(Linear(), Linear(), alpha_end=0.9)
    t = torch.tensor([0.5, 0.89, 0.95, 1.0], dtype=torch.float64)
    assert schedules.alpha(t).tolist() == pytest.approx([0.5, 0.89, 0.9, 0.9])
    assert schedules.insertion_hazard(t).tolist() == pytest.approx([2.0, 1 / 0.11, 0.0, 0.0])
    assert (schedules.unmasking_hazard(t) > 0).all()
    u = torch.tensor([0.89, 0.91], dtype=torch.float64)
    t1, t2 = schedules.hitting_times(u, torch.tensor([0.5, 0.5]))
    assert t1.tolist() == pytest.approx([0.89, math.inf])
    assert t2[0] == pytest.approx(0.945) and t2[1] == math.inf


@pytest.mark.parametrize("insertion", SCHEDULES, ids=repr)
@pytest.mark.parametrize("alpha_end", [0.999, 1.0])
def test_leap_fractions_compose(insertion: Schedule, alpha_end: float) -> None:
    """What is left after two leaps is what is left after one over both."""
    schedules = Schedules(insertion, Power(2.0), alpha_end)
    times = torch.linspace(0, 1, 11, dtype=torch.float64)
    for fraction in (schedules.insertion_fraction, schedules.unmasking_fraction):
        parts = fraction(times[:-1], times[1:])
        assert ((parts >= 0) & (parts <= 1)).all()
        assert torch.allclose((1 - parts).prod(), 1 - fraction(times[0], times[-1]), atol=1e-12)
    whole = schedules.insertion_fraction(times[0], times[-1])
    assert whole == pytest.approx(min(alpha_end, float(insertion.value(torch.tensor(1.0)))))
    assert schedules.unmasking_fraction(times[0], times[-1]) == 1


def test_insertion_fraction_is_defined_where_nothing_is_left() -> None:
    one = torch.tensor(1.0, dtype=torch.float64)
    assert Schedules(Linear(), Linear(), alpha_end=1.0).insertion_fraction(one, one) == 0


def test_proportions_of_deleted_masked_and_clean_tokens() -> None:
    """Linear and linear: P(deleted) = 1 - t, P(mask) = -(1 - t) ln(1 - t)."""
    n = 200_000
    u = torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t1, t2 = Schedules(Linear(), Linear(), alpha_end=1.0).hitting_times(u[0], u[1])
    for t in (0.2, 0.5, 0.9):
        deleted = (t < t1).double().mean()
        masked = ((t1 <= t) & (t < t2)).double().mean()
        assert deleted == pytest.approx(1 - t, abs=0.004)
        assert masked == pytest.approx(-(1 - t) * math.log(1 - t), abs=0.004)
    # Averaged over t: one half deleted, a quarter mask, a quarter clean.
    t = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (t < t1).double().mean() == pytest.approx(0.5, abs=0.005)
    assert ((t1 <= t) & (t < t2)).double().mean() == pytest.approx(0.25, abs=0.005)


def test_alpha_end_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="alpha_end"):
        Schedules(Linear(), Linear(), alpha_end=0.0)
