"""Our training step beside the published one and the usual padded one: same documents, same noise, same modules.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --texts gsm8k/train.jsonl wikitext2/test.txt --plot docs/img/training_step.png

Toy LLaDA: d 256, 4 layers, vocabulary 8,192, window 1,024, LoRA r=128, 4 documents a step, 2 threads. The ways take
turns step by step, so that what else the machine does falls on all of them; figures are medians over the steps.
Time is that of a whole step: noise, forward, backward, clipping, AdamW. Peak memory is that of live tensors over one
step on the longest batch, weights and optimizer included.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from retrofit.training.memory import LiveBytes

from .step_ways import WAYS, Rows, Step
from .toy import natural_lengths, random_documents, read_texts, tokenised, toy_config, toy_model

DOCUMENTS, STEPS = 4, 40
OURS = WAYS[0].name

Figures = dict[str, dict[str, float]]  # way -> column -> figure


def measure(documents: list[Tensor]) -> Figures:
    """Medians over steps of DOCUMENTS consecutive documents each, means of rows, and peak memory."""
    config = toy_config()
    steps = {way.name: Step(toy_model(config), way) for way in WAYS}
    batches = [documents[i : i + DOCUMENTS] for i in range(0, len(documents), DOCUMENTS)]
    seen: dict[str, list[tuple[float, float, Rows]]] = {name: [] for name in steps}
    for i, batch in enumerate([batches[0], *batches]):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            rows = step.take(batch, DOCUMENTS * i)
            if i:  # the first step is a warm-up
                seen[name].append((time.perf_counter() - wall, time.process_time() - cpu, rows))
    longest = max(batches, key=lambda batch: sum(map(len, batch)))
    return {
        name: {
            "wall ms": 1e3 * statistics.median(wall for wall, _, _ in records),
            "CPU ms": 1e3 * statistics.median(cpu for _, cpu, _ in records),
            "peak MB": peak_megabytes(steps[name], longest),
            "block rows": statistics.mean(rows.block for *_, rows in records),
            "head rows": statistics.mean(rows.head for *_, rows in records),
        }
        for name, records in seen.items()
    }


def peak_megabytes(step: Step, documents: list[Tensor]) -> float:
    """Most bytes of live tensors in a step, weights and the optimizer's state included."""
    gc.collect()
    with LiveBytes("cpu") as live:
        live.count(step.model.parameters())
        live.count(tensor for state in step.optimizer.state.values() for tensor in state.values())
        step.take(documents, 0)
    return live.peak / 1e6


def report(title: str, figures: Figures) -> None:
    """A table of the ways, each figure with its ratio to ours."""
    columns = list(figures[OURS])
    print(f"\n{title:<34}" + "".join(f"{column:>19}" for column in columns))
    for name, row in figures.items():
        cells = (f"{row[column]:>10,.0f} ({row[column] / figures[OURS][column]:>5.2f}x)" for column in columns)
        print(f"  {name:<32}" + "".join(f"{cell:>19}" for cell in cells), flush=True)


def draw(results: dict[str, Figures], path: Path) -> None:
    """How many times dearer than ours the other ways are, in CPU time and in memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 0.55 * len(results) + 1.8), sharey=True, layout="constrained")
    others = {"published": "#b0563b", "padded, masked": "#c9a35a"}
    for axis, column, title in zip(axes, ("CPU ms", "peak MB"), ("time of a step", "peak memory"), strict=True):
        for place, (name, colour) in enumerate(others.items()):
            ratios = [figures[name][column] / figures[OURS][column] for figures in results.values()]
            at = [row + 0.38 * place - 0.19 for row in range(len(ratios))]
            bars = axis.barh(at, ratios, height=0.36, color=colour, label=name)
            axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.axvline(1, color="#23606e", linewidth=2)
        axis.set_title(f"{title}, ours = 1")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(results)), list(results))
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, nargs="*", default=[], help="files of text: GSM8K's .jsonl, raw lines")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps for each kind of document")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", type=Path, help="file for a picture of the ratios")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    count = DOCUMENTS * options.steps
    kinds = {
        "natural lengths": random_documents(natural_lengths(count)),
        "documents that fill the window": random_documents([1024] * count),
    }
    for path in options.texts:
        documents = tokenised(read_texts(path))
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))[:count]
        kinds[f"{path.parent.name}/{path.name}"] = [documents[i] for i in order.tolist()]
    results = {}
    for title, documents in kinds.items():
        lengths = [float(len(document)) for document in documents]
        results[title] = measure(documents)
        report(f"{title}, mean {statistics.mean(lengths):.0f}", results[title])
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
