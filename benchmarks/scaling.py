"""How a step's cost grows, and how evenly ranks are loaded.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --plot docs/img/scaling.png

The toy of `training_step`, CPU seconds of a step (median over repeats) against the documents' length, their number, and
the vocabulary. Ours has to grow with useful tokens, the published step with the canvas. Imbalance is the fullest rank's
rows over the mean, simulated for documents of natural length at stratified t.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from retrofit.data.stream import balance

from .step_ways import WAYS, Step
from .toy import natural_lengths, random_documents, toy_config, toy_model

LENGTHS = (64, 128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16)
VOCABULARIES = (1024, 4096, 16384, 65536)


def seconds(way: int, lengths: Iterable[int], *, vocabulary: int = 8192, repeats: int = 5) -> tuple[float, int]:
    """Median CPU seconds of a step of WAYS[way] on documents of these lengths, and the mean of its block rows."""
    step = Step(toy_model(toy_config(vocabulary=vocabulary)), WAYS[way])
    documents = random_documents(list(lengths), vocabulary=vocabulary)
    times, rows = [], []
    for repeat in range(repeats + 1):
        began = time.process_time()
        computed = step.take(documents, repeat * len(documents))
        times.append(time.process_time() - began)
        rows.append(computed.block)
    return statistics.median(times[1:]), round(statistics.mean(rows[1:]))


def imbalance(ranks: int, documents: int, steps: int = 50) -> tuple[float, float]:
    """Mean over steps of the fullest rank's rows over the mean, for greedy assignment and for documents as they come.

    Rows are 1 + n t: the tokens that survive at t, and the slot.
    """
    greedy, in_order = [], []
    for step in range(steps):
        lengths = torch.tensor(natural_lengths(documents, seed=step))
        strata = torch.randperm(documents, generator=torch.Generator().manual_seed(step))
        rows = (1 + lengths * (strata + 0.5) / documents).round().long()
        loads = torch.tensor([int(rows[chosen].sum()) for chosen in balance(rows.tolist(), ranks)])
        greedy.append(float(loads.max() / loads.double().mean()))
        dealt = rows.view(ranks, -1).sum(1)
        in_order.append(float(dealt.max() / dealt.double().mean()))
    return statistics.mean(greedy), statistics.mean(in_order)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="file for a picture of the three curves")
    options = parser.parse_args()
    torch.set_num_threads(2)
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for title, values, arguments in (
        ("length of 4 documents", LENGTHS, lambda n: ([n] * 4, 8192)),
        ("documents of 300 tokens", BATCHES, lambda n: ([300] * n, 8192)),
        ("vocabulary, 4 documents of 300", VOCABULARIES, lambda n: ([300] * 4, n)),
    ):
        print(f"{title:<32}{'ours ms':>9}{'rows':>7}{'us a row':>10}{'published ms':>14}{'ratio':>7}")
        for value in values:
            lengths, vocabulary = arguments(value)
            (ours, rows), (theirs, _) = (seconds(way, lengths, vocabulary=vocabulary) for way in (0, 1))
            curves.setdefault(title, []).append((value, ours, theirs))
            print(
                f"{value:<32}{1e3 * ours:>9.0f}{rows:>7}{1e6 * ours / rows:>10.0f}{1e3 * theirs:>14.0f}"
                f"{theirs / ours:>6.1f}x",
                flush=True,
            )
    print(f"{'ranks, 8 documents each':<32}{'greedy':>9}{'as they come':>14}")
    for ranks in (2, 16, 128):
        greedy, in_order = imbalance(ranks, 8 * ranks)
        print(f"{ranks:<32}{greedy:>9.3f}{in_order:>14.2f}")
    if options.plot is not None:
        draw(curves, options.plot)


def draw(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """Three panels of milliseconds, ours and the published step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.2), layout="constrained")
    for axis, (title, points) in zip(axes, curves.items(), strict=True):
        values, ours, theirs = zip(*points, strict=True)
        axis.loglog(values, [1e3 * s for s in theirs], "o-", color="#b0563b", label="published")
        axis.loglog(values, [1e3 * s for s in ours], "o-", color="#23606e", label="ours")
        axis.set_xlabel(title)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
    axes[0].set_ylabel("CPU ms a step")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
