"""Directories written at once, where a test needs some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from retrofit.checkpoints.adapters import AdapterSettings, adapter_files
from retrofit.checkpoints.saving import Content, Saver
from retrofit.checkpoints.weights import write_files


def save_now(directory: Path, files: Mapping[str, Content]) -> None:
    """Writes a directory that is whole or absent, by this process alone.

    Raises:
        OSError: it could not be written; nothing of it is left.
    """
    directory.parent.parent.mkdir(parents=True, exist_ok=True)
    saver = Saver(0, 1)
    saver.begin(directory, 0, files)
    outcome = saver.wait()
    assert outcome is not None
    if outcome.problem:
        raise OSError(f"{directory}: {outcome.problem}")


def save_adapter(
    directory: Path,
    weights: Mapping[str, Tensor],
    settings: AdapterSettings,
    *,
    base_model: str,
    base_revision: str | None,
) -> None:
    """Writes an ordinary PEFT directory (see `adapter_files`)."""
    directory.mkdir(parents=True, exist_ok=True)
    write_files(directory, adapter_files(weights, settings, base_model=base_model, base_revision=base_revision))
