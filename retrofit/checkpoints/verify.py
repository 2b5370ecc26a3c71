"""`retrofit verify`: which checkpoints of a run are good, and why the others are not."""

from __future__ import annotations

import sys
from pathlib import Path

from . import checkpoint


def verify(path: Path) -> None:
    """Prints a line for each checkpoint of a run, or for a single directory with a manifest.

    Raises:
        ValueError: there is none, or none is good.
    """
    if not path.is_dir():
        raise ValueError(f"{path}: no such directory")
    checkpoints = path / "checkpoints"
    steps = checkpoint.steps_present(checkpoints)
    is_run = checkpoints.is_dir() or (path / "final").is_dir()
    directories = [*steps, *([path / "final"] if (path / "final").is_dir() else [])] if is_run else [path]
    if not directories:
        raise ValueError(f"{path}: this run has no checkpoint yet")
    good: list[Path] = []
    for directory in directories:
        problem = _find_problem(directory)
        if problem is None:
            good.append(directory)
        print(f"{directory.name:<16} {_size(directory):>12}  {problem or 'good'}")
    if checkpoints.is_dir():
        for rest in sorted(checkpoints.glob(f"{checkpoint.TEMPORARY}*")):
            print(f"{rest.name:<16} {_size(rest):>12}  half-written; removed when the run goes on")
    resumable = [directory for directory in good if directory in steps]
    if resumable:
        print(f"a resumed run goes on from {resumable[-1].name}")
    if not good:
        raise ValueError(f"{path}: no checkpoint is good")


def _find_problem(directory: Path) -> str | None:
    """As `checkpoint.find_problem`, with the file that is being read shown on a terminal."""

    def show(name: str) -> bool:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\033[Kreading {directory.name}/{name}")
            sys.stderr.flush()
        return True

    with checkpoint.reading(directory):
        problem = checkpoint.find_problem(directory, only=show)
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    return problem


def _size(directory: Path) -> str:
    total = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return f"{total / 1e6:,.1f} MB"
