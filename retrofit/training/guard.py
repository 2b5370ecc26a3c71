"""What ends a run before its last step: a signal, the time limit, or a loss or gradient that is not finite.

Exit codes:

| code | meaning                                                                                              |
| ---- | ---------------------------------------------------------------------------------------------------- |
| 0    | the run is complete                                                                                  |
| 2    | refused: one line says what, where and how to mend it                                                |
| 3    | loss, gradient norm or a weight is not finite; nothing was updated with it, nothing was saved        |
| 4    | a rank hangs or is gone (`watch` names it), or a data worker is gone; start the same command again   |
| 75   | stopped by a signal or the time limit after saving; start the same command again (a scheduler does)  |
| 128+ | a second signal ended the process at once; nothing half-saved is taken for good                      |

Launchers such as torchrun report their own code (1) when a rank exits with another than 0; `outcome.json` has ours.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

import psutil

EXIT_NOT_FINITE = 3
EXIT_HANGING = 4
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 2.0
"""A second signal within this time is the same one again: a terminal sends Ctrl-C to every process of the job, and the
launcher then passes its own on."""


class Preempted(SystemExit):
    """A signal came or the time was up; the run was saved and stops with EXIT_REQUEUE."""

    def __init__(self) -> None:
        super().__init__(EXIT_REQUEUE)


class NotFinite(SystemExit):
    """Training diverged; the run stops with EXIT_NOT_FINITE."""

    def __init__(self) -> None:
        super().__init__(EXIT_NOT_FINITE)


TIME_LIMIT = "the time limit"


class SignalGuard:
    """Notes the first signal, for the loop to act upon between steps; a second one ends the process at once.

    Ending at once does no harm: what is being saved has a temporary name, and every finished checkpoint is whole.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._deadline = math.inf

    def stop_after(self, minutes: float | None) -> None:
        """Sets the age of this process, from its very start, at which its time is up, as if a signal came."""
        if minutes is not None:
            age = time.time() - psutil.Process().create_time()
            self._deadline = time.monotonic() - age + 60 * minutes

    @property
    def received(self) -> str | None:
        """The signal's name, or TIME_LIMIT; None while the run may go on. Never None again once it was not."""
        if self._signal is None and time.monotonic() >= self._deadline:
            return TIME_LIMIT
        return self._signal

    def __enter__(self) -> SignalGuard:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._signal is None:
            self._signal = signal.Signals(number).name
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > ECHO_SECONDS:
            os._exit(128 + number)


def describe_divergence(
    *, step: int, what: str, value: float, ordinals: Sequence[int], offending: Sequence[int], last_good: str | None
) -> str:
    """One line for a stop on a value that is not finite.

    Args:
        step: the step (from 1) whose update was not made.
        ordinals: first and last draw of the step.
        offending: draws whose own loss is not finite.
    """
    blame = f"the loss of draws {', '.join(map(str, offending))}" if offending else what
    return (
        f"step {step}: {what} is {value} (draws {ordinals[0]} to {ordinals[-1]}; not finite: {blame}); stopped before "
        f"the update; last good checkpoint: {last_good or 'none'}; lower optimizer.learning_rate or look at these draws"
    )


def ignore_signals(_: int) -> None:
    """For data workers, which inherit the handlers: the training process decides when they end."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def announce(text: str) -> None:
    """One line on stderr."""
    print(f"retrofit: {text}", file=sys.stderr, flush=True)
