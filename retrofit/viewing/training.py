"""Pictures of a training run: its losses, what its insertion head expects, and the lengths that it writes.

Each function takes records as the run wrote them and gives a matplotlib Figure, drawn without a display.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind can tell apart; the held-out points differ by their marks too.
COLOURS = {"loss": "#333333", "unmasking": "#0072B2", "insertion": "#D55E00"}
NAMES = {"loss": "both terms", "unmasking": "unmasking", "insertion": "insertion"}
DATA, SAMPLES = "#999999", "#0072B2"
SMOOTHED = 1 / 30  # of all training points: width of the running mean
LOGARITHMIC = 20.0  # largest over smallest loss from which the axis is logarithmic


def loss_curve(train: Sequence[Mapping[str, Any]], held_out: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss, faint as logged and thick as a running mean, and held-out loss as points; each term by itself.

    Args:
        train, held_out: records of log.jsonl, in the order of steps. Values that are not numbers are left out.

    Raises:
        ValueError: there is no loss in them.
    """
    curves = {name: (_points(train, name), _points(held_out, name)) for name in COLOURS}
    if not any(len(steps) for pair in curves.values() for steps, _ in pair):
        raise ValueError("no loss was logged")
    if not any(len(steps) for steps, _ in curves["insertion"]):
        curves = {"loss": curves["loss"]}  # a plain masked-diffusion model: its one term is the loss
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, ((steps, losses), (held_steps, held_losses)) in curves.items():
        colour = COLOURS[name]
        axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(steps, running_mean(losses, SMOOTHED), color=colour, linewidth=1.8, label=NAMES[name])
        axes.plot(held_steps, held_losses, color=colour, marker="o", markersize=5, linestyle="none")
    if len(curves) == 1:
        axes.get_lines()[1].set_label("loss")
    axes.plot([], [], color="black", marker="o", markersize=5, linestyle="none", label="held out")
    shown = np.concatenate([losses for pair in curves.values() for _, losses in pair])
    if shown.min() > 0 and shown.max() / shown.min() > LOGARITHMIC:
        axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token of the window)")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def lengths(samples: Sequence[tuple[int, int]], histogram: Sequence[tuple[int, int]]) -> Figure:
    """How long samples were at each step of training, beside how long the training documents are.

    Args:
        samples: (step, tokens) of each sample.
        histogram: (largest length of the bin, documents in it), as a store's manifest has it.

    Raises:
        ValueError: there are no samples, or no documents.
    """
    documents = sum(count for _, count in histogram)
    if not samples or not documents:
        raise ValueError("there are no lengths to compare")
    figure = Figure(figsize=(7, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    steps, tokens = zip(*samples, strict=True)
    left.plot(steps, tokens, "o", color=SAMPLES, markersize=5, alpha=0.7)
    left.set_xlabel("step")
    left.set_ylabel("tokens, prompt included")
    left.set_title("samples", fontsize="medium")
    upper = [length for length, _ in histogram]
    lower = [0, *upper[:-1]]
    widths = [high - low for low, high in zip(lower, upper, strict=True)]  # they differ: bins end at powers of two
    right.barh(
        lower,
        [10_000 * count / documents / width for (_, count), width in zip(histogram, widths, strict=True)],
        height=widths,
        align="edge",
        color=DATA,
        edgecolor="white",
    )
    right.set_xlabel("% per 100 tokens")
    right.set_title("training data", fontsize="medium")
    left.set_ylim(0, 1.05 * max(*tokens, *upper))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def calibration(expected: Sequence[float], missing: Sequence[float]) -> Figure:
    """Tokens missing in each held-out document against those that the model expects, and means of tenths of them.

    Where the insertion head is calibrated, the means lie on the diagonal.

    Args:
        expected, missing: of each document at its t, summed over its open gaps.

    Raises:
        ValueError: there are no documents.
    """
    if not expected:
        raise ValueError("there are no gaps to compare")
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.add_subplot()
    x, y = np.array(expected), np.array(missing)
    tenths = [part for part in np.array_split(np.argsort(x, kind="stable"), 10) if len(part)]
    limit = 1.05 * max(x.max(), y.max(), 1.0)
    axes.plot([0, limit], [0, limit], color="#333333", linewidth=0.8, linestyle=(0, (4, 3)))
    axes.plot(x, y, "o", color=DATA, markersize=3, alpha=0.5, label="a document")
    means = [x[part].mean() for part in tenths], [y[part].mean() for part in tenths]
    axes.plot(*means, "s", color=COLOURS["insertion"], markersize=6, label="mean of a tenth")
    axes.set(xlabel="tokens expected", ylabel="tokens missing", xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def running_mean(values: np.ndarray, share: float) -> np.ndarray:
    """The mean over a window of `share` of all values (at least one) around each; narrower at both ends."""
    half = int(share * len(values) / 2 + 0.5)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return np.asarray((sums[last] - sums[first]) / (last - first))


def png(figure: Figure) -> bytes:
    """The figure as a PNG file, the same bytes each time, without a note of what made it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata={"Software": None})
    return buffer.getvalue()


def _points(records: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of a field."""
    pairs = [(record.get("step"), record.get(name)) for record in records]
    good = [(x, y) for x, y in pairs if isinstance(x, int) and isinstance(y, int | float) and math.isfinite(y)]
    return np.array([x for x, _ in good], dtype=float), np.array([y for _, y in good], dtype=float)
