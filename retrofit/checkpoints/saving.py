"""Saving beside training: every rank writes its files in a thread of its own, and rank 0 commits them.

No collective is used: a thread beside training must not take part in any. The ranks meet in a temporary directory
instead. Each writes and reads back its files, then leaves a *part*: a small file with their sizes and SHA-256, or with
what went wrong. Rank 0 waits for all parts, writes the manifest last and renames the directory. Whatever fails on the
way, the directory under its final name is whole or absent, and the checkpoints before it are not touched.

Points of the probe: "save.begin", "save.block", "save.file", "save.part", "save.manifest", "save.rename", "save.done".
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from retrofit.probe import Probe, no_probe

from . import checkpoint
from .tensor_file import write_bytes, write_tensors

Content = Mapping[str, Tensor] | bytes
"""Tensors of a safetensors file (contiguous, on the CPU), or the bytes of any other file."""

PART = "part-{:05d}.json"
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Outcome:
    """What came of one save, as far as this rank knows: rank 0 of the whole, another of its own part.

    Attributes:
        problem: one line, or None if all went well.
        bytes: written, by rank 0 those of all ranks. seconds: from begin to end.
        remark: what else is to be said, such as a rotation that failed.
    """

    directory: Path
    problem: str | None
    bytes: int
    seconds: float
    remark: str | None = None


class Saver:
    """This rank's part in the saves of a run. All ranks call `begin` in the same order.

    Args:
        time_out: seconds that rank 0 waits for the others after it has written its own files.
    """

    def __init__(self, rank: int, world_size: int, probe: Probe = no_probe, time_out: float = 1800.0) -> None:
        self.rank, self.world_size, self.probe, self.time_out = rank, world_size, probe, time_out
        self._attempt = 0
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._aborted: str | None = None
        self._temporary: Path | None = None

    def begin(
        self,
        directory: Path,
        step: int,
        files: Mapping[str, Content],
        *,
        then: Callable[[Path], None] | None = None,
    ) -> None:
        """Starts to write and returns at once.

        Args:
            directory: the final name. What already stands there is moved aside, never deleted. Its parent is made, but
                not the parent's parent: a run that was deleted, or whose disk was unmounted, is not made anew.
            files: path within the directory -> content; this rank's share. Must not change until the save has ended.
            then: run by rank 0's thread after the commit.
        """
        assert self._thread is None, "the save before has not been settled"
        self._attempt += 1
        self._aborted = self._outcome = None
        temporary = directory.parent / f"{checkpoint.TEMPORARY}{directory.name}-{self._attempt}"
        self._temporary = temporary
        self._thread = threading.Thread(
            target=self._save, args=(directory, temporary, step, files, then), name=f"save {directory.name}"
        )
        self._thread.start()

    def poll(self) -> Outcome | None:
        """The outcome, once, when the save under way has ended; otherwise None."""
        return self.wait() if self._thread is not None and not self._thread.is_alive() else None

    def wait(self, alive: Callable[[], None] = lambda: None) -> Outcome | None:
        """Waits for the save under way; its outcome, or None if there is none.

        Args:
            alive: called now and then while waiting.
        """
        if self._thread is None:
            return None
        while self._thread.is_alive():
            self._thread.join(0.5)
            alive()
        self._thread = None
        return self._outcome

    def abort(self, reason: str) -> None:
        """Makes rank 0 give up the save under way, because another rank's part failed."""
        self._aborted = reason

    def clear(self) -> None:
        """Removes what a failed save has left: to be called on rank 0 when no rank writes any more."""
        if self._outcome is not None and self._outcome.problem is not None and self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    # ---- in the thread

    def _save(
        self,
        directory: Path,
        temporary: Path,
        step: int,
        files: Mapping[str, Content],
        then: Callable[[Path], None] | None,
    ) -> None:
        began, size, remark = time.monotonic(), 0, None
        problem: str | None = None
        try:
            entries = self._write_part(temporary, step, files)
            if self.rank == 0:
                entries = self._commit(directory, temporary, step, entries)
                remark = self._follow_up(directory, then)
            size = sum(entry["bytes"] for entry in entries.values())
        except BaseException as error:  # whatever it is, training has to hear of it in one line
            problem = describe(error, directory)
            if self.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
        self._outcome = Outcome(directory, problem, size, time.monotonic() - began, remark)

    def _write_part(self, temporary: Path, step: int, files: Mapping[str, Content]) -> dict[str, checkpoint.Entry]:
        """Writes this rank's files; a rank other than 0 then leaves its part."""
        try:
            entries = self._write_files(temporary, step, files)
        except BaseException as error:
            if self.rank > 0:
                with suppress(OSError):  # rank 0 then misses this part
                    for name in files:
                        (temporary / name).unlink(missing_ok=True)  # on a full disk the part would find no room
                    self._leave_part(temporary, step, {"problem": describe(error, temporary)})
            raise
        if self.rank > 0:
            self._leave_part(temporary, step, {"files": entries})
        return entries

    def _write_files(self, temporary: Path, step: int, files: Mapping[str, Content]) -> dict[str, checkpoint.Entry]:
        self.probe("save.begin", step, temporary)
        if not temporary.parent.exists():
            temporary.parent.mkdir(exist_ok=True)
        temporary.mkdir(exist_ok=True)
        entries: dict[str, checkpoint.Entry] = {}
        for name, content in files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)

            def block(path: Path = path) -> None:
                self.probe("save.block", step, path)

            digest = (
                write_bytes(path, content, block) if isinstance(content, bytes) else write_tensors(path, content, block)
            )
            self.probe("save.file", step, path)
            if _read_back(path) != digest:
                raise OSError(f"{path.name} reads back differently from what was written")
            entries[name] = {"bytes": path.stat().st_size, "sha256": digest}
        return entries

    def _leave_part(self, temporary: Path, step: int, part: Mapping[str, Any]) -> None:
        self.probe("save.part", step, temporary)
        checkpoint.write_text(temporary / PART.format(self.rank), json.dumps(part))

    def _commit(
        self, directory: Path, temporary: Path, step: int, own: dict[str, checkpoint.Entry]
    ) -> dict[str, checkpoint.Entry]:
        """Adds the other ranks' files to rank 0's own, and gives the directory its name; returns all of them."""
        entries = self._with_other_parts(temporary, own)
        for name, entry in entries.items():
            if (found := (temporary / name).stat().st_size) != entry["bytes"]:
                raise OSError(f"{name} has {found} bytes where {entry['bytes']} were written")
        self.probe("save.manifest", step, temporary)
        checkpoint.commit(temporary, directory, entries, lambda: self.probe("save.rename", step, directory))
        self.probe("save.done", step, directory)
        return entries

    def _with_other_parts(self, temporary: Path, own: dict[str, checkpoint.Entry]) -> dict[str, checkpoint.Entry]:
        entries = dict(own)
        waiting = set(range(1, self.world_size))
        deadline = time.monotonic() + self.time_out
        while waiting:
            for rank in sorted(waiting):
                path = temporary / PART.format(rank)
                if path.is_file():
                    part = json.loads(path.read_text(encoding="utf-8"))
                    if "problem" in part:
                        raise OSError(f"rank {rank}: {part['problem']}")
                    twice = sorted(entries.keys() & part["files"].keys())
                    if twice:
                        raise OSError(f"rank {rank} wrote {twice[0]}, as another rank did")
                    entries |= part["files"]
                    waiting.discard(rank)
                    path.unlink()
            if self._aborted is not None:
                raise OSError(self._aborted)
            if waiting and time.monotonic() > deadline:
                ranks = ", ".join(map(str, sorted(waiting)))
                raise OSError(f"rank {ranks} wrote nothing that rank 0 can see within {self.time_out:.0f} s")
            if waiting:
                time.sleep(_POLL_SECONDS)
        return entries

    def _follow_up(self, directory: Path, then: Callable[[Path], None] | None) -> str | None:
        try:
            if then is not None:
                then(directory)
        except OSError as error:
            return describe(error, directory)
        return None


def _read_back(path: Path) -> str:
    """The file's SHA-256 from the disk, where the system can be told to forget what it has in memory."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return checkpoint.sha256(path)


def describe(error: BaseException, place: Path) -> str:
    """An error of a save in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({Path(error.filename).name if error.filename else place.name})"
    return " ".join(str(error).split()) or type(error).__name__
