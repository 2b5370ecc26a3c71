"""The one injector of faults: `fail_at(rank, step, where, do)` is handed to `train` or `Saver` as its probe."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from retrofit.probe import Probe

Fault = Callable[[Any], None]


def fail_at(rank: int | None, step: int | None, where: str, do: Fault, *, times: int = 1, after: int = 0) -> Probe:
    """A probe that does harm at a point.

    Args:
        rank, step: None means any. rank is this process's, by the launcher.
        times: how often. after: how many passes of the point are let go first.
    """
    passes = 0

    def probe(at: str, at_step: int, subject: Any = None) -> None:
        nonlocal passes
        own = int(os.environ.get("RANK", "0"))
        if at != where or step not in (None, at_step) or rank not in (None, own):
            return
        passes += 1
        if after < passes <= after + times:
            do(subject)

    return probe


def both(*probes: Probe) -> Probe:
    """Several faults in one run."""

    def probe(where: str, step: int, subject: Any = None) -> None:
        for one in probes:
            one(where, step, subject)

    return probe


def disk_full(_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(_: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def stale_handle(_: Any) -> None:
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def send(number: int) -> Fault:
    """The process sends itself a signal."""
    return lambda _: os.kill(os.getpid(), number)


kill = send(signal.SIGKILL)


def hang(_: Any) -> None:
    time.sleep(3600)


def spoil(batch: Any) -> None:
    """Makes a micro-batch's loss NaN."""
    batch.timesteps.fill_(torch.nan)


def out_of_memory(_: Any) -> None:
    raise torch.OutOfMemoryError("a fault")
