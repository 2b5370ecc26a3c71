"""What can be known of a run before it starts: how large its checkpoints are, and whether they fit on the disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.adapters import AdapterSettings
from retrofit.sections import TrainingSection


@dataclass(frozen=True)
class CheckpointBytes:
    """Size of one checkpoint, without its few small files: JSON and the tokenizer's.

    Attributes:
        state: float32 masters, moments and, with an average, the averaged weights; files of all ranks.
        weights: what loads by itself; final/ has this alone.
    """

    state: int
    weights: int

    @property
    def whole(self) -> int:
        return self.state + self.weights


def checkpoint_bytes(
    model: nn.Module, adapter: AdapterSettings | None, dtype: torch.dtype, *, ema: bool
) -> CheckpointBytes:
    """Counts a checkpoint from shapes alone.

    Args:
        model: as training starts it, on the meta device: factors injected, what is trained marked.
        adapter: the factors' shape; they and the new modules are written in float32. None: all weights, in `dtype`.
        ema: whether averaged weights are kept.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    state = (4 if ema else 3) * trainable * torch.float32.itemsize
    return CheckpointBytes(state, trainable * (torch.float32 if adapter is not None else dtype).itemsize)


def checkpoints_at_once(training: TrainingSection) -> int:
    """The most checkpoints that a run holds at a time: the new one is whole before an old one goes."""
    saves = -(-training.max_steps // training.save_steps)
    if training.save_total_limit is None:
        return saves
    for_good = training.max_steps // training.save_every_keep if training.save_every_keep is not None else 0
    return min(saves, training.save_total_limit + 1 + for_good)


def check_space(directory: Path, size: CheckpointBytes, training: TrainingSection, *, base: int = 0) -> list[str]:
    """Compares the free space of a run directory with what the run is to write there.

    Args:
        directory: the run's; it need not exist yet. Checkpoints that it holds already take no more space.
        base: bytes of a merged base that the run is to write first.

    Returns:
        warnings, a line each.

    Raises:
        ValueError: not even one checkpoint and final/ fit.
        OSError: the space cannot be asked for.
    """
    place = directory.resolve()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    final = 0 if (directory / "final").is_dir() else size.weights
    if free < base + size.whole + final:
        raise ValueError(
            f"training.output_dir: {directory} has {gigabytes(free)} free; one checkpoint of {gigabytes(size.whole)} "
            f"and final/ of {gigabytes(size.weights)}{f' and a merged base of {gigabytes(base)}' if base else ''} do "
            "not fit; make room, or choose another directory"
        )
    most = checkpoints_at_once(training)
    to_come = max(1, most - len(checkpoint.steps_present(directory / "checkpoints")))
    if free < base + to_come * size.whole + final:
        kept = "all are kept" if training.save_total_limit is None else f"save_total_limit {training.save_total_limit}"
        return [
            f"training.output_dir: {directory} has {gigabytes(free)} free, and {to_come} checkpoints of "
            f"{gigabytes(size.whole)} and final/ are to come ({kept}; a new one is whole before an old one goes): "
            "the disk will be full before the run is complete; make room, or lower training.save_total_limit"
        ]
    return []


def gigabytes(size: int) -> str:
    """`96.2 GB` (10^9 bytes)."""
    return f"{size / 1e9:.3g} GB" if size < 1e11 else f"{size / 1e9:.0f} GB"
