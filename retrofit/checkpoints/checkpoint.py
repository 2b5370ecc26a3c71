"""Checkpoints that are whole or absent.

A directory is written under a temporary name beside its own, every file is flushed to disk, `manifest.json` with sizes,
SHA-256 and its own digest comes last, and one rename gives the directory its name. A checkpoint is good if it verifies;
"latest" is the newest good one, whatever its time of modification. Nothing is pickled.

Layout of `step-00001000/`: weights that load by themselves (`model.safetensors` or `adapter/`, with `config.json` and
the tokenizer's files), `training_state.safetensors` (float32 `master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>` and
`ema/<name>`), `training_state.json` and, with dropout, `rng.safetensors`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
STATE_TENSORS = "training_state.safetensors"
STATE_RECORD = "training_state.json"
RNG_TENSORS = "rng.safetensors"
FORMAT_VERSION = 1

_STEP_NAME = re.compile(r"step-(\d{8})")
TEMPORARY = ".writing-"  # .writing-step-00001000


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step that a directory's name says, or None if it is not a checkpoint's name."""
    match = _STEP_NAME.fullmatch(directory.name)
    return int(match.group(1)) if match else None


# -------------------------------------------------------------------------------------------------------------- writing


def write_directory(directory: Path, write: Callable[[Path], None]) -> str:
    """Writes a directory that is whole or absent, and verifies it.

    Args:
        directory: the final name. What already stands there is moved aside to `broken-N-<name>`, never deleted.
        write: puts the files into the (temporary) directory that it is given.

    Returns:
        the manifest's digest, which stands for the contents.

    Raises:
        OSError: the directory could not be written; nothing of it is left, and what was there before is as it was.
    """
    temporary = directory.parent / f"{TEMPORARY}{directory.name}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        write(temporary)
        digest = _write_manifest(temporary)
        for folder in sorted({path.parent for path in temporary.rglob("*")} | {temporary}):
            _sync(folder)
        if directory.exists():
            _move_aside(directory)
        temporary.rename(directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # safetensors hides the OSError of a full disk in its own error
            raise OSError(f"{directory}: {error}") from error
        raise
    problem = find_problem(directory)
    if problem:
        raise OSError(f"{directory}: does not verify after writing: {problem}")
    return digest


def _write_manifest(directory: Path) -> str:
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        _sync(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": files}
    record["digest"] = digest_of(record)
    (directory / MANIFEST).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _sync(directory / MANIFEST)
    return str(record["digest"])


def digest_of(record: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, its own field `digest` left out."""
    body = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_aside(directory: Path) -> None:
    number = 1
    while (aside := directory.with_name(f"broken-{number}-{directory.name}")).exists():
        number += 1
    directory.rename(aside)


def write_text(path: Path, text: str) -> None:
    """Writes one small file that is whole or as it was before."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


# ------------------------------------------------------------------------------------------------------------ verifying


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own digest checked. Raises ValueError saying what is wrong with it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        stated, files = record["digest"], record["files"]
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values()):
            raise ValueError("an entry has no size or SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not readable") from error
    if stated != digest_of(record):
        raise ValueError(f"{MANIFEST} was changed since it was written")
    return dict(record)


def find_problem(directory: Path, only: Callable[[str], bool] = lambda name: True) -> str | None:
    """What is wrong with a checkpoint, or None if it is good: every file there, of its size and with its SHA-256.

    Args:
        only: chooses the files to check by their names; the manifest is always checked.
    """
    try:
        files = read_manifest(directory)["files"]
        for name, entry in files.items():
            if not only(name):
                continue
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != entry["bytes"]:
                return f"{name} has {size} bytes, the manifest says {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} differs from its SHA-256 in the manifest"
    except (ValueError, OSError) as error:
        return str(error)
    return None


def steps_present(checkpoints: Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest step first, good or not."""
    if not checkpoints.is_dir():
        return []
    return sorted((path for path in checkpoints.iterdir() if step_of(path) is not None), key=lambda path: path.name)


def latest(checkpoints: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and those newer than it that do not, each with the reason."""
    passed_over: list[tuple[Path, str]] = []
    for directory in reversed(steps_present(checkpoints)):
        problem = find_problem(directory)
        if problem is None:
            return directory, passed_over
        passed_over.append((directory, problem))
    return None, passed_over


def rotate(checkpoints: Path, keep: int, newest: Path) -> None:
    """Deletes the oldest checkpoints beyond `keep`. To be called once `newest` has verified, which is never deleted.

    Directories that do not verify are left alone and not counted: they are evidence, and deleting is final.
    """
    good = [path for path in steps_present(checkpoints) if (path / MANIFEST).is_file() and path != newest]
    for directory in good[: max(0, len(good) + 1 - keep)]:
        if find_problem(directory, only=lambda name: False) is None:
            # The manifest goes first, so that a deletion cut short leaves nothing that could be taken for good.
            (directory / MANIFEST).unlink()
            shutil.rmtree(directory, ignore_errors=True)


def remove_temporaries(checkpoints: Path) -> None:
    """Removes what a killed save left. Only the process that holds the run directory may call it."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(f"{TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- training state


def write_state(directory: Path, tensors: dict[str, Tensor], record: dict[str, Any], rng: dict[str, Tensor]) -> None:
    """Writes the training state into a checkpoint that is being written."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / STATE_TENSORS)
    (directory / STATE_RECORD).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if rng:
        save_file(rng, directory / RNG_TENSORS)


def read_state(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Tensor]]:
    """(tensors, record, generator states) of a checkpoint."""
    rng = load_file(directory / RNG_TENSORS) if (directory / RNG_TENSORS).is_file() else {}
    return load_file(directory / STATE_TENSORS), read_record(directory), rng


def read_record(directory: Path) -> dict[str, Any]:
    """training_state.json alone."""
    return dict(json.loads((directory / STATE_RECORD).read_text(encoding="utf-8")))
