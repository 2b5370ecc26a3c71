"""Whether the stream of training steps keeps up with the devices, and what a large store costs to open and to hold.

    python -m benchmarks.feeding
    python -m benchmarks.feeding --gigabytes 10 --directory runs/benchmark

Rates are of one core: a rank finds the lengths of all the step's documents and corrupts its own, so it has to get
through steps as fast as all ranks together train. Waiting is the share of the time in which a step that takes so long,
and does nothing but sleep, stands still for want of data. With --gigabytes, a store of that size is opened and read;
its tokens are zeros that take no room on the disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from retrofit.data.store import ARRAYS, Manifest, SplitRecord, TokenizerRecord, TokenStore
from retrofit.data.stream import StepStream, document_order
from retrofit.objective import FlexMDMObjective
from retrofit.training.feeding import feed

from .toy import WINDOW, natural_lengths, toy_config

ROWS_A_GPU = 25_000
"""x_t rows a second that an H100 computes of an 8B model, at most: an estimate, not measured here."""


def milliseconds(work: Callable[[], object], repeats: int = 30) -> float:
    """CPU milliseconds of a call, the least of many: what other work on the machine disturbs takes longer."""
    work()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return 1e3 * min(times)


def make_store(path: Path, lengths: list[int]) -> TokenStore:
    """A store of documents of these lengths whose files have holes in place of contents."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    count, tokens = len(lengths), int(offsets[-1])
    (path / "train").mkdir(parents=True)
    for name, size in {"tokens": tokens, "flags": tokens + count, "offsets": count + 1}.items():
        array = np.lib.format.open_memmap(path / "train" / f"{name}.npy", "w+", ARRAYS[name], (size,))
        if name == "offsets":
            array[:] = offsets
        array.flush()
    record = SplitRecord(
        documents=count,
        tokens=tokens,
        digest="",
        bytes={name: (path / "train" / f"{name}.npy").stat().st_size for name in ARRAYS},
        longest=max(lengths),
        median_length=300,
        lengths=[(WINDOW, count)],
        mean_deletable_tokens=tokens / count,
        mean_gap=tokens / count,
    )
    tokenizer = TokenizerRecord("none", None, "", 1, "", None, None, None)
    manifest = Manifest(tokenizer, "text", WINDOW, 0.0, 0, [], count, count, {}, {"train": record})
    (path / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return TokenStore.open(path)


def stream_of(store: TokenStore, documents: int, ranks: int) -> StepStream:
    """Rank 0's part of steps of so many documents."""
    return StepStream(
        store, FlexMDMObjective(toy_config(), seed=0), seed=0, documents_per_step=documents, time_strata=documents,
        max_tokens_per_device=16384, world_size=ranks, max_steps=1 << 40,
    )  # fmt: skip


def rates(directory: Path) -> None:
    """Prints what the parts of a step cost one rank, and how many devices a core feeds."""
    print(f"{'ms a step':<18}{'documents':>10}{'ranks':>6}{'draws':>7}{'lengths':>8}{'cut':>6}", end="")
    print(f"{'read':>6}{'corrupt':>8}{'pack':>6}{'all':>7}{'M clean tokens/s':>18}{'M rows/s':>9}{'GPUs fed':>9}")
    for name, lengths in (("natural lengths", natural_lengths(50_000)), ("full windows", [WINDOW] * 20_000)):
        store = make_store(directory / name.replace(" ", "-"), lengths)
        for documents, ranks in ((128, 1), (128, 16), (128, 128), (1024, 16), (1024, 128)):
            stream = stream_of(store, documents, ranks)
            draws = stream._draws(stream.ordinals(0))
            rows = stream._count_rows(draws)
            own = draws[torch.tensor([i for bin in stream.cut(rows)[::ranks] for i in bin])]
            read = store.documents(own.documents)
            examples = stream._examples(own)
            parts = [
                milliseconds(work)
                for work in (
                    lambda stream=stream: stream._draws(stream.ordinals(0)),
                    lambda stream=stream, draws=draws: stream._count_rows(draws),
                    lambda stream=stream, rows=rows: stream.cut(rows),
                    lambda store=store, own=own: store.documents(own.documents),
                    lambda stream=stream, read=read, own=own: stream.objective.prepare(read, own.ordinals, own.u),
                    lambda examples=examples, own=own: examples.micro_batch(range(len(own.u))),
                )
            ]
            whole = milliseconds(lambda stream=stream: stream[0])
            tokens = int(store.kept(draws.documents)[1].sum())
            print(
                f"{name:<18}{documents:>10}{ranks:>6}{parts[0]:>7.2f}{parts[1]:>8.2f}{parts[2]:>6.2f}{parts[3]:>6.2f}"
                f"{parts[4]:>8.2f}{parts[5]:>6.2f}{whole:>7.1f}{tokens / whole / 1e3:>18.1f}"
                f"{sum(rows) / whole / 1e3:>9.1f}{1e3 * sum(rows) / whole / ROWS_A_GPU:>9.0f}",
                flush=True,
            )


def waiting(directory: Path, steps: int = 30) -> None:
    """Prints the share of the time that is spent waiting, against the workers and the duration of a step."""
    store = TokenStore.open(directory / "natural-lengths")
    workers = (0, 1, 2)
    print(f"{'waiting':<26}" + "".join(f"{f'{count} workers':>22}" for count in workers))
    for ranks, seconds in ((1, 0.9), (16, 0.055), (16, 0.02)):
        print(f"{f'{ranks} ranks, {1e3 * seconds:.0f} ms a step':<26}", end="")
        for count in workers:
            batches = feed(stream_of(store, 128, ranks), range(steps + 1), workers=count, pin=False)
            next(batches)
            waited = []
            for _ in range(steps):
                time.sleep(seconds)
                began = time.perf_counter()
                next(batches)
                waited.append(time.perf_counter() - began)
            median = statistics.median(waited)
            print(f"{f'{median / (median + seconds):.1%} ({1e3 * median:.1f} ms)':>22}", end="", flush=True)
        print()


def memory(name: str) -> float:
    """A line of /proc/self/status, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1e3


def first_step(path: Path, workers: int) -> tuple[float, float]:
    """Milliseconds to open a store, and from there to have a first step."""
    began = time.perf_counter()
    store = TokenStore.open(path)
    opened = time.perf_counter()
    batches = feed(stream_of(store, 128, 16), range(4), workers=workers, pin=False)
    next(batches)
    return 1e3 * (opened - began), 1e3 * (time.perf_counter() - opened)


def hold(path: Path, steps: int) -> None:
    """Prints what opening, the first step and many steps of a store cost."""
    store = TokenStore.open(path)
    size = sum(file.stat().st_size for file in path.rglob("*.npy"))
    for count in (0, 1, 2):
        opened, first = zip(*(first_step(path, count) for _ in range(5)), strict=True)
        print(f"{size / 1e9:.2f} GB, {len(store):,} documents, {count} workers: opened in", end=" ")
        print(f"{statistics.median(opened):.1f} ms, a first step {statistics.median(first):.0f} ms after that")
    before, stream = memory("RssAnon"), stream_of(store, 128, 16)
    places = np.arange(5) * (len(store) // 128 // 5)  # all through the first epoch
    for part, place in enumerate(places.tolist()):
        for step in range(place, place + steps):
            stream[step]
        print(
            f"after {(part + 1) * steps:>6} steps: own memory {memory('RssAnon') - before:>5.1f} MB more than before, "
            f"page cache mapped {memory('RssFile'):>6.0f} MB",
            flush=True,
        )
    order = milliseconds(lambda: document_order(torch.arange(128), len(store), 0))
    print(f"the documents of a step: {order:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, help="size of a store to open and read, instead of the rates")
    parser.add_argument("--directory", type=Path, help="where stores are made for the time of the run")
    parser.add_argument("--steps", type=int, default=2000, help="steps between two lines about memory")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.directory is not None:
        options.directory.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(dir=options.directory))
    try:
        if options.gigabytes is None:
            rates(directory)
            waiting(directory)
        else:
            for size in (options.gigabytes / 100, options.gigabytes):
                make_store(directory / f"{size}", natural_lengths(int(size * 1e9 / (5 * 355 + 9))))
                hold(directory / f"{size}", options.steps)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
