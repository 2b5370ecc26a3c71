"""Our training step beside the published one and the usual padded one: same documents, same noise, same modules.

    python -m benchmarks.training_step
    python -m benchmarks.training_step --texts gsm8k/train.jsonl wikitext2/test.txt --plot docs/img/training_step.png

Toy LLaDA: d 256, 4 layers, vocabulary 8,192, window 1,024, LoRA r=128, 4 documents a step, 2 threads. The ways take
turns step by step, so that what else the machine does falls on all of them; figures are medians over the steps.
Time is that of a whole step: noise, forward, backward, clipping, AdamW. Peak memory is that of live tensors over one
step on the longest batch, weights and optimizer included.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time

import torch
from torch import Tensor

from .step_ways import WAYS, Rows, Step
from .toy import natural_lengths, random_documents, toy_config, toy_model

DOCUMENTS = 4


def measure(documents: list[Tensor], repeats: int) -> dict[str, dict[str, float]]:
    """Name of a way -> medians over steps of DOCUMENTS consecutive documents, and its peak memory in MB."""
    config = toy_config()
    steps = {way.name: Step(toy_model(config), way) for way in WAYS}
    batches = [documents[i : i + DOCUMENTS] for i in range(0, repeats * DOCUMENTS, DOCUMENTS)]
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


def peak_megabytes(step, documents):
    sys.path.insert(0, "/tmp")
    from tracker import LiveBytes

    gc.collect()
    with LiveBytes([*step.model.parameters(), *(t for s in step.optimizer.state.values() for t in s.values())]) as mode:
        step.take(documents, 0)
    return mode.peak / 1e6


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name, lengths in (("natural", natural_lengths(80)), ("full", [1024] * 24)):
        out = measure(random_documents(lengths), len(lengths) // 4)
        ours = out["packed (ours)"]
        for way, r in out.items():
            print(name, f"{way:16}", *(f"{k} {v:8.1f} ({v / ours[k]:5.2f}x)" for k, v in r.items()), flush=True)
