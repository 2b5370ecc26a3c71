"""Checkpoints that are whole or absent.

A directory is written under a temporary name beside its own, every file is flushed to disk, `manifest.json` with sizes,
SHA-256 and its own digest comes last, and one rename gives the directory its name. A checkpoint is good if it verifies;
"latest" is the newest good one, whatever its time of modification. Nothing is pickled.

Layout of `step-00001000/`: weights that load by themselves (`model.safetensors` or `adapter/`, with `config.json` and
the tokenizer's files), `training_state-00001-of-00004.safetensors`, one of each rank that wrote it (float32
`master/<name>`, `exp_avg/<name>`, `exp_avg_sq/<name>` and `ema/<name>`), `training_state.json` and, with dropout,
`rng.safetensors`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypedDict

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .weights import TensorFiles, share_of

MANIFEST = "manifest.json"
STATE_RECORD = "training_state.json"
RNG_TENSORS = "rng.safetensors"
FORMAT_VERSION = 2

_STEP_NAME = re.compile(r"step-(\d{8})")
TEMPORARY = ".writing-"  # .writing-step-00001000


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(directory: Path) -> int | None:
    """The step that a directory's name says, or None if it is not a checkpoint's name."""
    match = _STEP_NAME.fullmatch(directory.name)
    return int(match.group(1)) if match else None


# -------------------------------------------------------------------------------------------------------------- writing


class Entry(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


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
        entries: dict[str, Entry] = {}
        for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
            sync(path)
            name = path.relative_to(temporary).as_posix()
            entries[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        digest = commit(temporary, directory, entries)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SafetensorError):  # safetensors hides the OSError of a full disk in its own error
            raise OSError(f"{directory}: {error}") from error
        raise
    problem = find_problem(directory)
    if problem:
        raise OSError(f"{directory}: does not verify after writing: {problem}")
    return digest


def commit(
    temporary: Path, directory: Path, entries: Mapping[str, Entry], before_rename: Callable[[], None] = lambda: None
) -> str:
    """Writes the manifest of a temporary directory, whose files are on disk already, and gives it its name.

    Returns:
        the manifest's digest.

    Raises:
        OSError: it could not be done; what stood under the name before stands there again. Or the directory stands
            there now, and its manifest or a file's size is not what was written.
    """
    record: dict[str, Any] = {"format_version": FORMAT_VERSION, "files": dict(sorted(entries.items()))}
    record["digest"] = digest_of(record)
    (temporary / MANIFEST).write_bytes(_manifest_bytes(record))
    sync(temporary / MANIFEST)
    for folder in sorted({path.parent for path in temporary.rglob("*")} | {temporary}):
        sync(folder)
    before_rename()
    aside = move_aside(directory, "broken") if directory.exists() else None
    try:
        temporary.rename(directory)
    except OSError:
        if aside is not None:
            aside.rename(directory)
        raise
    sync(directory.parent)
    problem = find_problem(directory, hashes=False)
    if problem:
        raise OSError(f"{directory}: does not verify after writing: {problem}")
    return str(record["digest"])


def _manifest_bytes(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(record, indent=1) + "\n").encode()


def digest_of(record: dict[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, its own field `digest` left out."""
    body = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """Hexadecimal SHA-256 of a file's bytes. `on_bytes` is called with the count of each block that was hashed."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Flushes a file or a directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move_aside(path: Path, why: str) -> Path:
    """Renames to `<why>-N-<name>` beside it, with the first N that is free; returns the new path."""
    number = 1
    while (aside := path.with_name(f"{why}-{number}-{path.name}")).exists():
        number += 1
    path.rename(aside)
    return aside


def write_text(path: Path, text: str) -> None:
    """Writes one small file that is whole or as it was before."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


# ------------------------------------------------------------------------------------------------------------ verifying


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its own digest checked. Raises ValueError saying what is wrong with it."""
    path = directory / MANIFEST
    if not path.is_file():
        raise ValueError(f"{MANIFEST} is missing")
    content = path.read_bytes()
    try:
        record = json.loads(content)
        stated, files = record["digest"], record["files"]
        if not all(isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in files.values()):
            raise ValueError("an entry has no size or SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is not readable") from error
    # The second comparison is for bytes that JSON takes no notice of.
    if stated != digest_of(record) or content != _manifest_bytes(record):
        raise ValueError(f"{MANIFEST} was changed since it was written")
    if record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise ValueError(f"{MANIFEST} has format {version}; this version of retrofit reads format {FORMAT_VERSION}")
    return dict(record)


def find_problem(
    directory: Path,
    only: Callable[[str], bool] = lambda name: True,
    *,
    hashes: bool = True,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> str | None:
    """What is wrong with a checkpoint, or None if it is good: every file there, of its size and with its SHA-256.

    Args:
        only: chooses the files to check by their names; the manifest is always checked.
        hashes: False compares sizes alone.
        on_bytes: called with the count of the bytes just hashed, several times a second.
    """
    try:
        with reading(directory):
            files = read_manifest(directory)["files"]
            for name, entry in files.items():
                if not only(name):
                    continue
                path = directory / name
                if not path.is_file():
                    return f"{name} is missing"
                if (size := path.stat().st_size) != entry["bytes"]:
                    return f"{name} has {size} bytes, the manifest says {entry['bytes']}"
                if hashes and sha256(path, on_bytes) != entry["sha256"]:
                    return f"{name} differs from its SHA-256 in the manifest"
    except OSError as error:
        return f"{Path(error.filename or directory).name} is not readable ({error.strerror or error})"
    except ValueError as error:
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


def shares(directory: Path, world_size: int) -> list[set[str]]:
    """The names of a checkpoint's files, shared out over ranks by bytes, for each to verify its own.

    Where the manifest is not readable the shares are empty: `find_problem` says so on every rank.
    """
    try:
        files = read_manifest(directory)["files"]
    except (ValueError, OSError):
        return [set() for _ in range(world_size)]
    ranks = share_of({name: entry["bytes"] for name, entry in files.items()}, world_size)
    return [{name for name, rank in ranks.items() if rank == mine} for mine in range(world_size)]


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """While it lasts, no run rotates the checkpoint away. Does nothing where there is no manifest to lock.

    Raises:
        ValueError: the checkpoint was rotated away just now.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            descriptor = os.open(directory / MANIFEST, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            # On a file system without locks nothing protects the checkpoint, and it is read all the same.
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            # Not left to the closing: a process forked meanwhile has the descriptor too.
            stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)
            if not (directory / MANIFEST).exists():
                raise ValueError(f"{directory}: its run has just deleted it, since newer checkpoints are there")
        yield


def rotate(
    checkpoints: Path, keep: int, newest: Path, every: int | None = None, before: Callable[[Path], None] | None = None
) -> None:
    """Deletes the oldest checkpoints beyond `keep`. To be called once `newest` has verified, which is never deleted.

    Directories that do not verify are left alone and not counted: they are evidence, and deleting is final. One that
    somebody reads (see `reading`) stays until the next time. A directory loses its name first, so that a deletion cut
    short leaves nothing that could be taken for a checkpoint, and `remove_temporaries` finishes it.

    Args:
        every: checkpoints of steps that are multiples of it are kept for good and not counted.
        before: called with each directory that is about to be deleted.
    """
    kept = [path for path in steps_present(checkpoints) if every and (step_of(path) or 0) % every == 0]
    good = [path for path in steps_present(checkpoints) if (path / MANIFEST).is_file() and path not in (newest, *kept)]
    for directory in good[: max(0, len(good) + 1 - keep)]:
        if find_problem(directory, only=lambda name: False) is not None:
            continue
        with _deleting(directory) as is_free:
            if not is_free:
                continue
            if before is not None:
                before(directory)
            doomed = directory.with_name(f"{TEMPORARY}{directory.name}-deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            directory.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def _deleting(directory: Path) -> Iterator[bool]:
    """Whether nobody reads the checkpoint; while it lasts, whoever wants to has to wait."""
    descriptor = os.open(directory / MANIFEST, os.O_RDWR)  # NFS gives an exclusive lock for writing only
    try:
        is_free = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_free = False
        except OSError:
            pass  # a file system without locks
        yield is_free
    finally:
        os.close(descriptor)


def remove_temporaries(checkpoints: Path) -> None:
    """Removes what a killed save left. Only the process that holds the run directory may call it."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(f"{TEMPORARY}*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------------- training state


def state_file(rank: int, world_size: int) -> str:
    """`training_state-00001-of-00004.safetensors` for rank 0 of 4."""
    return f"training_state-{rank + 1:05d}-of-{world_size:05d}.safetensors"


def open_state(directory: Path) -> tuple[TensorFiles, dict[str, Any], dict[str, Tensor]]:
    """(tensors, record, generator states) of a checkpoint; the tensors are read when they are asked for."""
    record = read_record(directory)
    world_size = record["world_size"]
    tensors = TensorFiles([directory / state_file(rank, world_size) for rank in range(world_size)])
    rng = load_file(directory / RNG_TENSORS) if (directory / RNG_TENSORS).is_file() else {}
    return tensors, record, rng


def read_record(directory: Path) -> dict[str, Any]:
    """training_state.json alone."""
    return dict(json.loads((directory / STATE_RECORD).read_text(encoding="utf-8")))
