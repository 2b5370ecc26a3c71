"""The run directory: who holds it, what is in it, and its log.

    recipe.yaml  environment.json  log.jsonl  samples.jsonl  checkpoints/step-00001000/  final/  lock.json  outcome.json

`log.jsonl` holds one strict JSON object a line (numbers that are not finite are written as text). When a run resumes at
an earlier step than the log has reached, the later lines are set aside in `log-superseded-1.jsonl` and so on.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import secrets
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from retrofit.checkpoints import checkpoint

from .guard import announce
from .outcome import OUTCOME

LOG = "log.jsonl"
SAMPLES = "samples.jsonl"
LOCK = "lock.json"
NONCE = f"{checkpoint.TEMPORARY}nonce"
PREVIOUS = "previous-"


class RunDirectory:
    """An output directory. Rank 0 acquires it, after which nobody else can write it until `release`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self._lock: int | None = None
        self._pending: dict[str, list[str]] = {}

    def holds_run(self) -> bool:
        """Whether the directory holds a run, finished or not."""
        return (self.path / "recipe.yaml").is_file() or self.checkpoints.is_dir()

    # ---- the lock

    def acquire(self) -> str | None:
        """Takes the directory for this process, making it if need be, and removes what a killed save left.

        The lock is a POSIX one: it ends with its process however that ends, works over NFS, and data workers do not
        inherit it.

        Returns:
            who held the directory without having released it (a process that died), or None.

        Raises:
            ValueError: a live process holds it (named), or the directory holds something that is not a run.
            OSError: it cannot be made or written.
        """
        self._refuse_foreign()
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        self._lock_file(descriptor)
        previous = os.pread(descriptor, 4096, 0)
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, (json.dumps(record) + "\n").encode(), 0)
        self._lock = descriptor
        checkpoint.remove_temporaries(self.checkpoints)
        checkpoint.remove_temporaries(self.path)
        return _describe_holder(previous) if previous.strip() else None

    def look(self) -> Path:
        """Refuses what `acquire` would, and changes nothing; returns the path.

        Raises:
            ValueError: as `acquire`. OSError: the directory, or the one it would be made in, cannot be written.
        """
        self._refuse_foreign()
        place = self.path.resolve()
        while not place.is_dir():
            place = place.parent
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "training.output_dir cannot be written", str(place))
        if (self.path / LOCK).is_file():
            descriptor = os.open(self.path / LOCK, os.O_RDWR)
            self._lock_file(descriptor)
            os.close(descriptor)
        return self.path

    def _refuse_foreign(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"training.output_dir: {self.path} is a file; choose another directory")
        if self.path.is_dir() and not self.holds_run():
            names = (item.name for item in self.path.iterdir())
            own = (LOCK, OUTCOME)
            foreign = sorted(
                name for name in names if name not in own and not name.startswith((checkpoint.TEMPORARY, PREVIOUS))
            )
            if foreign:
                raise ValueError(
                    f"training.output_dir: {self.path} holds {foreign[0]} and is not a run; choose another directory"
                )

    def _lock_file(self, descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _describe_holder(os.pread(descriptor, 4096, 0))
            os.close(descriptor)
            raise ValueError(
                f"training.output_dir: {self.path} is in use by {holder}; wait for it, stop it, or choose another"
            ) from None

    def release(self) -> None:
        """Lets others have the directory. The empty lock file stays: deleting it could split a lock in two."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    # ---- other hosts

    def write_nonce(self) -> str:
        """Writes something that nobody else can have written, for the other ranks to find; returns it."""
        nonce = secrets.token_hex(16)
        checkpoint.write_text(self.path / NONCE, nonce)
        return nonce

    def sees_nonce(self, nonce: str, patience: float = 10.0) -> bool:
        """Whether this process sees what rank 0 wrote, allowing for a network file system that lags."""
        deadline = time.monotonic() + patience
        while True:
            with suppress(OSError):
                if (self.path / NONCE).read_text(encoding="utf-8") == nonce:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def remove_nonce(self) -> None:
        (self.path / NONCE).unlink(missing_ok=True)

    def set_everything_aside(self) -> Path:
        """Moves all that the directory holds, but for the lock, into `previous-N/`; returns that."""
        number = 1
        while (aside := self.path / f"{PREVIOUS}{number}").exists():
            number += 1
        items = [item for item in self.path.iterdir() if item.name != LOCK and not item.name.startswith(PREVIOUS)]
        aside.mkdir()
        for item in items:
            item.rename(aside / item.name)
        return aside

    # ---- the log

    def append(self, record: Mapping[str, Any], name: str = LOG) -> None:
        """Adds one line. What a full disk does not take is kept, said once, and written with a later line."""
        pending = self._pending.setdefault(name, [])
        pending.append(json.dumps(strict(record), allow_nan=False, ensure_ascii=False) + "\n")
        try:
            before = self._size(name)
            try:
                with open(self.path / name, "a", encoding="utf-8") as file:
                    file.write("".join(pending))
            except OSError:
                os.truncate(self.path / name, before)  # no torn line, and none twice
                raise
        except OSError as error:
            if len(pending) == 1:
                announce(f"{self.path / name} cannot be written ({error.strerror}); its lines are kept in memory")
            return
        pending.clear()

    def _size(self, name: str) -> int:
        path = self.path / name
        return path.stat().st_size if path.is_file() else 0

    def set_aside(self, step: int) -> Path | None:
        """Moves the log's and samples' lines past `step`, and a torn last line, to a file of their own; returns it."""
        aside: Path | None = None
        for name in (LOG, SAMPLES):
            path = self.path / name
            if not path.is_file():
                continue
            kept: list[str] = []
            later: list[str] = []
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
                (kept if _belongs(line, step) else later).append(line if line.endswith("\n") else line + "\n")
            if later:
                number = 1
                stem = name.removesuffix(".jsonl")
                while (target := self.path / f"{stem}-superseded-{number}.jsonl").exists():
                    number += 1
                checkpoint.write_text(target, "".join(later))
                checkpoint.write_text(path, "".join(kept))
                aside = aside or target
        return aside


def _describe_holder(content: bytes) -> str:
    try:
        record = json.loads(content)
        return f"process {record['pid']} on {record['host']} (since {record['since']})"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _belongs(line: str, step: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= step and line.endswith("\n")
    except (ValueError, KeyError, TypeError):
        return False


def strict(value: Any) -> Any:
    """The value with numbers that JSON does not know (NaN, infinities) as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value
