"""Where the time of a training step goes: a table by part and by operator, and a trace for a timeline viewer.

    python -m benchmarks.profile_step
    python -m benchmarks.profile_step --trace runs/step.json

The toy and the documents of `training_step`, our way; the trace opens in Perfetto or chrome://tracing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from .step_ways import WAYS, Step
from .toy import natural_lengths, random_documents, toy_config, toy_model

DOCUMENTS, STEPS, WARM_UP = 4, 20, 3
_PARTS = ("noise", "forward", "backward", "clip", "update")

_KINDS: dict[str, Callable[[str], bool]] = {
    "matrix products": lambda name: any(part in name for part in ("aten::mm", "aten::addmm", "aten::bmm")),
    "attention": lambda name: "scaled_dot_product" in name,
    "dropout's draws": lambda name: "bernoulli" in name,
    "softmax of the loss": lambda name: "log_softmax" in name or "logsumexp" in name or "exp" in name,
    "AdamW": lambda name: "adamw" in name.lower(),
    "copies, gathers": lambda name: any(
        part in name for part in ("copy", "index", "cat", "gather", "scatter", "clone")
    ),
}


def kind_of(operator: str) -> str:
    """The row of the table that an operator's own time belongs to."""
    return next((kind for kind, belongs in _KINDS.items() if belongs(operator)), "the rest, elementwise")


def profiled(steps: int) -> Any:
    """A profile of `steps` steps of the toy."""
    documents = random_documents(natural_lengths(DOCUMENTS * (steps + WARM_UP)))
    step = Step(toy_model(toy_config()), WAYS[0])
    batches = [documents[i : i + DOCUMENTS] for i in range(0, len(documents), DOCUMENTS)]
    for i, batch in enumerate(batches[:WARM_UP]):
        step.take(batch, DOCUMENTS * i)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for i, batch in enumerate(batches[WARM_UP:], start=WARM_UP):
            step.take(batch, DOCUMENTS * i, mark=record_function)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--trace", type=Path, help="file for the timeline")
    options = parser.parse_args()
    torch.set_num_threads(2)
    found = profiled(options.steps)
    if options.trace is not None:
        options.trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(options.trace))
    events = found.key_averages()
    parts = {event.key: event.cpu_time_total for event in events if event.key in _PARTS}
    print(f"{'part':<24}{'ms a step':>10}{'share':>8}")
    for part in _PARTS:
        print(f"{part:<24}{parts[part] / 1e3 / options.steps:>10.2f}{parts[part] / sum(parts.values()):>8.1%}")
    kinds: dict[str, float] = {}
    for event in events:
        if event.key not in _PARTS:
            kinds[kind_of(event.key)] = kinds.get(kind_of(event.key), 0.0) + event.self_cpu_time_total
    print(f"\n{'operators, own time':<24}{'ms a step':>10}{'share':>8}")
    for kind, microseconds in sorted(kinds.items(), key=lambda item: -item[1]):
        print(f"{kind:<24}{microseconds / 1e3 / options.steps:>10.2f}{microseconds / sum(kinds.values()):>8.1%}")


if __name__ == "__main__":
    main()
