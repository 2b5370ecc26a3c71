"""Pictures of a training run, by what is in the figures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from retrofit.viewing.training import calibration, lengths, loss_curve, png, running_mean

TRAIN: list[dict[str, Any]] = [
    {"step": 10 * i, "loss": 3.0 / i, "unmasking": 2.0 / i, "insertion": 1.0 / i} for i in range(1, 61)
]
HELD_OUT = [{"step": 300, "loss": 0.5, "unmasking": 0.3, "insertion": 0.2}]


def parts(figure: Figure) -> list[Any]:
    return list(figure.axes)


def labels(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_loss_curve_shows_both_terms_as_logged_smoothed_and_held_out() -> None:
    (axes,) = parts(loss_curve(TRAIN, HELD_OUT))
    assert labels(axes) == ["both terms", "unmasking", "insertion", "held out"]
    raw, smooth, points = axes.get_lines()[3:6]  # of the unmasking term
    assert list(raw.get_ydata()) == [record["unmasking"] for record in TRAIN]
    assert smooth.get_ydata()[30] == pytest.approx(np.mean(raw.get_ydata()[29:32]))
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([300], [0.3])
    assert axes.get_yscale() == "log"  # 3 to 1/60


def test_a_run_of_one_term_has_one_curve_and_what_is_not_a_number_is_left_out() -> None:
    train = [{"step": i, "loss": loss, "unmasking": loss} for i, loss in enumerate([2.0, "NaN", 1.0, None])]
    (axes,) = parts(loss_curve(train, []))
    assert labels(axes) == ["loss", "held out"]
    assert list(axes.get_lines()[0].get_xdata()) == [0, 2] and axes.get_yscale() == "linear"


def test_the_running_mean_keeps_a_constant_and_the_ends() -> None:
    assert np.allclose(running_mean(np.full(7, 3.0), 0.5), 3.0)
    assert list(running_mean(np.array([0.0, 1.0, 5.0]), 0.1)) == [0.0, 1.0, 5.0]
    assert len(running_mean(np.array([]), 0.1)) == 0


def test_lengths_of_samples_stand_beside_the_density_of_the_data() -> None:
    left, right = parts(lengths([(10, 120), (20, 90)], [(64, 1), (128, 3)]))
    (points,) = left.get_lines()
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([10, 20], [120, 90])
    areas = [bar.get_width() * bar.get_height() / 100 for bar in right.patches]  # % per 100 tokens times tokens
    assert areas == pytest.approx([25, 75])
    assert [bar.get_y() for bar in right.patches] == [0, 64] and left.get_ylim() == right.get_ylim()


def test_calibration_shows_means_of_tenths_by_what_was_expected() -> None:
    (axes,) = parts(calibration([*range(19, -1, -1)], [*range(39, -1, -2)]))
    _, documents, means = axes.get_lines()
    assert len(documents.get_xdata()) == 20
    assert list(means.get_xdata()) == [2 * i + 0.5 for i in range(10)]
    assert list(means.get_ydata()) == [4 * i + 2 for i in range(10)]  # missing is 2 expected + 1
    assert axes.get_xlim() == axes.get_ylim()
    assert len(parts(calibration([1.0], [0.0]))[0].get_lines()[2].get_xdata()) == 1
    with pytest.raises(ValueError, match="^there are no gaps to compare$"):
        calibration([], [])


def test_pictures_are_the_same_bytes_each_time_and_not_empty() -> None:
    first, second = (png(loss_curve(TRAIN, HELD_OUT)) for _ in range(2))
    assert first == second
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.format == "PNG" and picture.width > 600
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20


def test_nothing_is_drawn_of_nothing() -> None:
    with pytest.raises(ValueError, match="^no loss was logged$"):
        loss_curve([{"step": 1, "loss": "NaN"}], [])
    for samples, histogram in (([], [(64, 1)]), ([(1, 2)], [])):
        with pytest.raises(ValueError, match="^there are no lengths to compare$"):
            lengths(samples, histogram)
