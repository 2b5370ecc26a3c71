"""Whether the stream of training steps keeps up with the devices, and what a large store costs to open and to hold.

    python -m benchmarks.feeding
    python -m benchmarks.feeding --store runs/ten-gigabytes --gigabytes 10

Without a store: tokens a second of one core, by part. A step has 128 documents, and every rank draws the whole of it:
so one rank has to draw as fast as all ranks together train. With a store: a synthetic one is made there (its tokens are
zeros that take no room on the disk), and opening it, the first step and the memory over many steps are measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retrofit.data.store import ARRAYS, Manifest, SplitRecord, TokenizerRecord, TokenStore
from retrofit.data.stream import StepStream, balance
from retrofit.objective import FlexMDMObjective

from .toy import WINDOW, natural_lengths, random_documents, right_padded, toy_config

DOCUMENTS = 128
ROWS_A_GPU = 25_000
"""x_t rows a second that an H100 computes of an 8B model, at most: an estimate, not measured here."""


def seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Mean CPU seconds of a call."""
    work()
    began = time.process_time()
    for _ in range(repeats):
        work()
    return (time.process_time() - began) / repeats


def rates() -> None:
    """Prints what the parts of a step cost, and the rates of the whole."""
    objective = FlexMDMObjective(toy_config(), seed=0)
    ordinals, times = torch.arange(DOCUMENTS), (torch.arange(DOCUMENTS).double() + 0.5) / DOCUMENTS
    columns = f"{'noise':>7}{'cut':>6}{'pack all':>10}{'M clean tokens/s':>18}{'M rows/s':>10}"
    print(f"{'ms a step of 128 documents':<28}{columns}")
    for name, lengths in (("natural lengths", natural_lengths(DOCUMENTS)), ("full windows", [WINDOW] * DOCUMENTS)):
        documents = right_padded(random_documents(lengths))
        examples = objective.prepare(documents, ordinals, times)
        rows = examples.lengths.tolist()
        noise = seconds(lambda documents=documents: objective.prepare(documents, ordinals, times))
        cut = seconds(lambda rows=rows: balance(rows, 16))
        packing = seconds(lambda examples=examples: examples.micro_batch(range(DOCUMENTS)))
        whole = noise + cut + packing
        print(
            f"{name:<28}{1e3 * noise:>7.1f}{1e3 * cut:>6.2f}{1e3 * packing:>10.1f}"
            f"{sum(lengths) / whole / 1e6:>18.1f}{sum(rows) / whole / 1e6:>10.1f}"
        )
        print(f"{'':<28}as many GPUs as one core feeds: {sum(rows) / whole / ROWS_A_GPU:.0f}")
    for ranks in (16, 128):
        lengths = natural_lengths(8 * ranks)
        cut = seconds(lambda lengths=lengths, ranks=ranks: balance(lengths, ranks))
        print(f"cutting {8 * ranks} documents for {ranks} ranks: {1e3 * cut:.1f} ms")


def make_store(path: Path, gigabytes: float, length: int = 500) -> None:
    """Writes a store of documents of `length` tokens whose files have holes in place of contents."""
    count = int(gigabytes * 1e9 / (5 * length + 9))
    sizes = {"tokens": count * length, "flags": count * (length + 1), "offsets": count + 1}
    (path / "train").mkdir(parents=True)
    for name, size in sizes.items():
        array = np.lib.format.open_memmap(path / "train" / f"{name}.npy", "w+", ARRAYS[name], (size,))
        if name == "offsets":
            array[:] = np.arange(count + 1, dtype=np.int64) * length
        array.flush()
    record = SplitRecord(
        documents=count,
        tokens=count * length,
        digest="",
        bytes={name: (path / "train" / f"{name}.npy").stat().st_size for name in ARRAYS},
        longest=length,
        median_length=length,
        lengths=[(512, count)],
        mean_deletable_tokens=float(length),
        mean_gap=float(length),
    )
    tokenizer = TokenizerRecord("none", None, "", 1, "", None, None, None)
    manifest = Manifest(tokenizer, "text", length, 0.0, 0, [], count, count, {}, {"train": record})
    (path / "manifest.json").write_text(json.dumps(manifest.to_dict()))


def memory(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def hold(path: Path, steps: int) -> None:
    """Prints what opening, the first step and many steps of a store cost."""
    size = sum(file.stat().st_size for file in path.rglob("*.npy"))
    before, began = memory("RssAnon"), time.perf_counter()
    store = TokenStore.open(path)
    opened = time.perf_counter() - began
    objective = FlexMDMObjective(toy_config(), seed=0)
    stream = StepStream(
        store, objective, seed=0, documents_per_step=DOCUMENTS, time_strata=DOCUMENTS, max_tokens_per_device=16384,
        max_steps=1 << 40,
    )  # fmt: skip
    began = time.perf_counter()
    stream[0]
    print(f"{size / 1e9:.1f} GB, {len(store):,} documents: opened in {1e3 * opened:.1f} ms", end=", ")
    print(f"first step in {1e3 * (time.perf_counter() - began):.0f} ms")
    for part in range(5):
        began = time.process_time()
        for step in range(part * steps, (part + 1) * steps):
            stream[1 + step]
        rate = steps * DOCUMENTS * 500 / (time.process_time() - began)
        print(
            f"after {(part + 1) * steps:>6} steps: own memory {memory('RssAnon') - before:>6.1f} MB more than before, "
            f"page cache in use {memory('RssFile'):>7.0f} MB, {rate / 1e6:.1f} M clean tokens/s",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="directory of the synthetic store; made if it is absent")
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--steps", type=int, default=2000, help="steps between two lines about memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.store is None:
        rates()
        return
    if not options.store.exists():
        make_store(options.store, options.gigabytes)
    hold(options.store, options.steps)


if __name__ == "__main__":
    main()
