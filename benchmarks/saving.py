"""What a save costs: how long training waits, and how fast a rank writes, verifies and reads its share.

    python -m benchmarks.saving --gigabytes 2 --directory runs/benchmark

The state is one rank's share: float32 tensors of 64 MiB. "Stall" is what training waits for: the copy of the state,
beside which the writing goes on; "synchronous" is the same save waited for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path

import torch

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.saving import Saver
from retrofit.checkpoints.weights import TensorFiles

FULL_8B = 116.2e9
"""Bytes of a checkpoint of recipes/llada-8b/transfer-full.yaml, 12 of state and 2 of weights a parameter."""


def forget(directory: Path) -> None:
    """Makes the system forget what it has of the files in memory, so that they are read from the disk."""
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--directory", type=Path, required=True, help="made, and removed at the end")
    options = parser.parse_args()
    count = max(1, round(options.gigabytes * 1e9 / (64 << 20)))
    live = {f"master/{i}": torch.randn(16 << 20) for i in range(count)}
    size = sum(tensor.nbytes for tensor in live.values())
    options.directory.mkdir(parents=True)
    try:
        rows = []
        for attempt in range(3):
            directory = options.directory / checkpoint.step_name(attempt)
            saver, name = Saver(0, 1), checkpoint.state_file(0, 1)
            began = time.monotonic()
            copies = {key: tensor.clone() for key, tensor in live.items()}
            saver.begin(directory, attempt, {name: copies})
            stall = time.monotonic() - began
            outcome = saver.wait()
            assert outcome is not None and outcome.problem is None
            whole = time.monotonic() - began
            forget(directory)
            began = time.monotonic()
            assert checkpoint.find_problem(directory) is None
            verify = time.monotonic() - began
            forget(directory)
            began = time.monotonic()
            files = TensorFiles([directory / name])
            for key in files.shapes:
                files.read(key)
            rows.append((stall, whole, verify, time.monotonic() - began))
            shutil.rmtree(directory)
        stall, whole, verify, read = (sorted(column)[1] for column in zip(*rows, strict=True))
        share = FULL_8B / 16
        print(f"{size / 1e9:.2f} GB, median of 3       seconds     MB/s    8B, a rank's share of 16")
        for label, seconds in (
            ("stall (asynchronous)", stall), ("synchronous save", whole), ("verify", verify), ("read", read)
        ):  # fmt: skip
            print(f"{label:<24} {seconds:>10.2f} {size / 1e6 / seconds:>8.0f} {share / size * seconds:>10.1f} s")
        print(f"training waits {whole / stall:.1f} times less than for the synchronous save")
    finally:
        shutil.rmtree(options.directory)


if __name__ == "__main__":
    main()
