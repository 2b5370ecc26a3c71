"""What came of a run, for schedulers: launchers of several processes exit with 1, whatever our exit code was.

Rank 0 writes one line, atomically, to `outcome.json` in the run directory and to the file that the environment variable
RETROFIT_OUTCOME names (a batch script's own, which it need not look for, and which is also there when a run was refused
before it had a directory). `exit_code` comes first, so that a shell can read it:

    sed -n 's/^{"exit_code": \\([0-9]*\\).*/\\1/p' outcome.json
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from retrofit.credentials import mask_tokens

from .guard import announce

OUTCOME = "outcome.json"
VARIABLE = "RETROFIT_OUTCOME"

_REASONS = {0: "complete", 2: "refused; the log says why", 130: "interrupted"}


class Outcome:
    """Around everything that a process does in a run: what it leaves by is what came of the run.

    An old outcome is removed at the start. SystemExit gives its code; an error of the user's (ValueError, OSError,
    ModuleNotFoundError) 2, as the command line does; any other 1.

    Attributes:
        step: steps completed, None before it is known.
        reason: why the run ends, where the exception does not say it.
    """

    def __init__(self, rank: int | None = None) -> None:
        """`rank`: of this process; None: what the launcher says, since a launch may be refused before there are any."""
        self._is_main = (int(os.environ.get("RANK", "0")) if rank is None else rank) == 0
        self._paths = [Path(path) for path in [os.environ.get(VARIABLE)] if path]
        self._remove()
        self.step: int | None = None
        self.reason: str | None = None

    def belongs_to(self, directory: Path) -> None:
        """The run directory is this run's from now on; before, it may be another's."""
        self._paths.append(directory / OUTCOME)
        self._remove()

    def _remove(self) -> None:
        if self._is_main:
            for path in self._paths:
                path.unlink(missing_ok=True)

    def write(self, exit_code: int, reason: str, step: int | None) -> None:
        """Writes it now, from any rank: for a process that is ended from beside the run."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        record = {"exit_code": exit_code, "reason": mask_tokens(reason), "step": step, "time": when}
        for path in self._paths:
            try:
                temporary = path.with_name(f".writing-{path.name}")
                temporary.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
                temporary.replace(path)
            except OSError as error:
                announce(f"{path} could not be written ({error.strerror or error}); the run ends with {exit_code}")

    def __enter__(self) -> Outcome:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if not self._is_main:
            return
        code = _exit_code(error)
        words = "" if isinstance(error, SystemExit) or error is None else str(error).strip()
        reason = self.reason or words.partition("\n")[0] or _REASONS.get(code) or type(error).__name__
        self.write(code, reason, self.step)


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, ValueError | OSError | ModuleNotFoundError) else 1
