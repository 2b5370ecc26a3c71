"""What a run will need, known before its first step: bytes of its checkpoints, and whether the disk has room."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from retrofit.checkpoints.checkpoint import steps_present
from retrofit.sections import Recipe

from .start import Start

_SMALL_FILES = 64 << 10  # headers, JSON


@dataclass(frozen=True)
class CheckpointBytes:
    """Sizes on disk, in bytes.

    Attributes:
        state: training state of one checkpoint. weights: what loads by itself, of a checkpoint or of final/.
        base: a merged base, written once, or 0.
    """

    state: int
    weights: int
    base: int = 0

    @property
    def checkpoint(self) -> int:
        return self.state + self.weights


def checkpoint_bytes(begin: Start, *, average: bool) -> CheckpointBytes:
    """Bytes of a run's checkpoints, from its model on the meta device alone.

    The state is float32: master, two moments and, with an average, that. Weights are float32 for an adapter (they are
    its trainable tensors) and of the recipe's dtype otherwise.
    """
    count = {name: shape.numel() for name, shape in begin.weights.shapes.items()}
    trained = sum(count[name] for name in begin.trainable)
    small = _SMALL_FILES + sum(len(content) for content in begin.tokenizer_files.values())
    width = 4 if begin.adapter is not None else begin.dtype.itemsize
    merged = begin.merged_base
    base = sum(merged.sizes.values()) + small if merged is not None else 0
    return CheckpointBytes(4 * (3 + average) * trained + small, width * trained + small, base)


def check_space(begin: Start, recipe: Recipe) -> str | None:
    """Compares the free space at the output directory with what the run will write there.

    What it holds already takes no more space: so many checkpoints less are to come, and final/ is not written twice.

    Returns:
        a warning, where it has room for some checkpoints but not for all that the recipe keeps.

    Raises:
        ValueError: not even one checkpoint and final/ fit.
    """
    section = recipe.training
    sizes = checkpoint_bytes(begin, average=section.ema_decay is not None)
    place = Path(section.output_dir).absolute()
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    free = status.f_bavail * status.f_frsize
    run = Path(section.output_dir)
    other = sizes.base + (0 if (run / "final").is_dir() else sizes.weights)
    least = sizes.checkpoint + other
    if free < least:
        raise ValueError(
            f"training.output_dir: {place} has {gigabytes(free)} free; one checkpoint takes "
            f"{gigabytes(sizes.checkpoint)} and final/ {gigabytes(sizes.weights)}; "
            "free some, or choose another directory"
        )
    saves = -(-section.max_steps // section.save_steps)
    limit = section.save_total_limit
    # One more than is kept is on disk while the newest is written; those kept for good come on top.
    most = saves if limit is None else min(saves, limit + 1)
    if limit is not None and section.save_every_keep is not None:
        most = min(saves, most + section.max_steps // section.save_every_keep)
    to_come = max(1, most - len(steps_present(run / "checkpoints")))
    needed = to_come * sizes.checkpoint + other
    if free >= needed:
        return None
    return (
        f"{place} has {gigabytes(free)} free, and the run will want {gigabytes(needed)} for {to_come} more checkpoints "
        f"of {gigabytes(sizes.checkpoint)} and final/; set training.save_total_limit, or saves will fail once "
        "it is full"
    )


def gigabytes(count: float) -> str:
    """`1.23 GB`, or `0.45 MB` for small ones."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"
