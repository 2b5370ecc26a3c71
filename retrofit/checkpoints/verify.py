"""`retrofit verify`: which checkpoints of a run are good, and why the others are not."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from . import checkpoint

_QUIET_SECONDS = {True: 2.0, False: 30.0}
"""Seconds between two lines of progress, by whether stderr is a terminal."""


def verify(path: Path) -> None:
    """Prints a line for each checkpoint of a run, or for a single directory with a manifest.

    Of a run these are its steps, final/ and a merged base; what a save left half-written or a run moved aside is
    named. The run may be under way.

    Raises:
        ValueError: there is none, or none is good.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    checkpoints = path / "checkpoints"
    steps = checkpoint.steps_present(checkpoints)
    if checkpoints.is_dir() or (path / "final").is_dir() or (path / "recipe.yaml").is_file():
        directories = [*steps, *_others(path)]
        if not directories:
            raise ValueError(f"{path}: this run has no checkpoint yet")
    elif (path / checkpoint.MANIFEST).is_file() or checkpoint.step_of(path) is not None:
        directories = [path]
    else:
        raise ValueError(f"{path}: neither a run nor a checkpoint (no checkpoints/, no {checkpoint.MANIFEST})")
    good: list[Path] = []
    for directory in directories:
        problem = _find_problem(directory)
        if not directory.exists():
            print(_line(directory, "deleted meanwhile by the run, which keeps newer ones"))
            continue
        if problem is None:
            good.append(directory)
        print(_line(directory, problem or "good"), flush=True)
    for folder in (checkpoints, path):
        for rest in sorted(folder.glob(f"{checkpoint.TEMPORARY}*/")):
            print(_line(rest, "half-written or half-deleted; removed when the run goes on"))
        for rest in sorted(folder.glob("broken-*/")):
            print(_line(rest, "was in the way of a save and moved aside; yours to delete"))
    resumable = [directory for directory in good if directory in steps]
    if resumable:
        print(f"a resumed run goes on from {resumable[-1].name}")
    if not any(directory in (*steps, path / "final", path) for directory in good):
        raise ValueError(f"{path}: no checkpoint is good")


def _others(run: Path) -> list[Path]:
    """final/, whole or not, and directories that have a manifest, such as a merged base."""
    found = {item for item in run.iterdir() if (item / checkpoint.MANIFEST).is_file()}
    return sorted(item for item in found | {run / "final"} if item.is_dir() and not item.name.startswith("broken-"))


def _line(directory: Path, state: str) -> str:
    return f"{directory.name:<16} {_size(directory) / 1e6:>12,.1f} MB  {state}"


def _find_problem(directory: Path) -> str | None:
    """As `checkpoint.find_problem`; where it takes long, how far it has come is shown."""
    total, done, is_terminal = _size(directory), 0, sys.stderr.isatty()
    shown_at = time.monotonic()

    def show(count: int) -> None:
        nonlocal done, shown_at
        done += count
        if time.monotonic() - shown_at > _QUIET_SECONDS[is_terminal]:
            shown_at = time.monotonic()
            text = f"reading {directory.name}: {done / 1e9:.1f} of {total / 1e9:.1f} GB"
            sys.stderr.write(f"\r\033[K{text}" if is_terminal else f"{text}\n")
            sys.stderr.flush()

    problem = checkpoint.find_problem(directory, on_bytes=show)
    if is_terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return problem


def _size(directory: Path) -> int:
    """Bytes of a directory's files. A run under way may rename or delete some of them meanwhile."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(folder, name)).st_size
    return total
