"""Names the rank that hangs, or is gone, and ends the job on every rank.

The loop beats as it passes its points, the same ones in the same order on every rank. A thread of each rank publishes
how far its rank has come, and where it is, in a store that all ranks reach. The job hangs when no rank that gives signs
of life has got on for its time-out; to blame are the ranks that give none (killed, suspended, machine gone) or that
left with an error, or else those furthest behind. One rank says so, in one line; all end with EXIT_HANGING.
A second thread keeps the time, since the store itself may stop answering, and with it the first thread.

Covered, with the rank named: a rank that hangs, is suspended (SIGSTOP), was killed or left with an error, whichever it
is; a broken connection between ranks, which is judged at once; a single process that hangs. Not taken for a hang: one
rank that works for long while the others wait for it, as long as it beats or calls `alive`; the whole job suspended
and continued (Ctrl-Z, fg), since a time-out counts only time in which this process ran.
Not covered: a C call that never gives Python's lock back, in a job of one process. Where the ranks hang together at the
same point all of them are named; their stacks, in `hang-rank-*.txt`, tell more.

The store is a connection of the watch's own to the one that the launch has anyway (MASTER_ADDR, MASTER_PORT). Nothing
else is shared with the process group: a collective that hangs holds its locks. Under torchrun and `accelerate launch`
the store lives in the launcher of the first machine, so rank 0's death is seen like any other; elsewhere it dies with
rank 0, and the others say that it cannot be reached.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed import DistError, HashStore, PrefixStore, Store, TCPStore

from .guard import EXIT_HANGING

Connect = Callable[[float], Store]
"""Makes a connection of its own to the store; each of its operations fails after so many seconds."""

_VERDICT, _OBEYED = "verdict", "obeyed"
_WAITING = ("torch.distributed", "deepspeed", "torch.autograd.graph")
"""Modules whose code, innermost on the stack, waits for other ranks."""


def launch_store(name: str, world_size: int) -> Connect:
    """Connections to the store of this launch; under one `name` (the same on all ranks) watches see each other."""
    if world_size == 1:
        alone = HashStore()
        return lambda seconds: alone

    def connect(seconds: float) -> Store:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))
        return PrefixStore(f"retrofit/watch/{name}", store)

    return connect


@dataclass(frozen=True)
class _Sign:
    """A rank's last sign of life.

    Attributes:
        serial: how many it has given.
        step, beats, where: the step under way, beats within it, and the point reached.
        idle, limit: seconds without progress, and how many it may take.
        place: innermost frame of the thread that trains. waits: whether that is a wait for other ranks.
        left: "" if it left well, otherwise why; None while it is there.
    """

    serial: int = 0
    step: int = 0
    beats: int = 0
    where: str = "start-up"
    idle: float = 0.0
    limit: float = 0.0
    place: str = ""
    waits: bool = False
    host: str = "?"
    left: str | None = None


class Watch:
    """This rank's part. Used as a context manager around everything that the ranks do together.

    Args:
        connect: see `launch_store`.
        step_seconds, start_seconds: time without progress that is a hang: after `started`, and before.
        directory: where stacks are written, if it exists.
        say: told the line, and the step under way, on the one rank that speaks; prints it and records the outcome.
        end: ends this process with an exit code.

    Attributes:
        newest: the newest good checkpoint, as far as this rank knows; named in the line.
    """

    def __init__(
        self,
        connect: Connect,
        rank: int,
        world_size: int,
        *,
        step_seconds: float,
        start_seconds: float,
        directory: Path,
        say: Callable[[str, int], None],
        end: Callable[[int], NoReturn] = os._exit,
    ) -> None:
        self.rank, self.world_size, self.directory = rank, world_size, directory
        self.newest: Path | None = None
        self._connect, self._say, self._end = connect, say, end
        self._step_seconds, self._limit = step_seconds, start_seconds
        # Well under the 30 seconds that torchrun gives the other ranks after one has ended.
        self._tick = min(2.0, step_seconds / 20, start_seconds / 20)
        self._patience = max(1.0, 3 * self._tick)
        self._mark = (0, 0, "start-up")
        self._moved = True
        self._sign = _Sign(host=socket.gethostname())
        self._clock = self._since = 0.0
        self._seen: dict[int, tuple[int, float]] = {}
        self._broken: tuple[str, float] | None = None
        self._left: str | None = None
        self._leave = threading.Event()
        self._answered = 0.0
        self._trouble = "no answer"
        self._ending = threading.Lock()
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"watch: {work.__name__}", daemon=True)
            for work in (self._keep_time, self._exchange)
        ]
        self._watched = 0

    # ---- what the loop calls

    def beat(self, step: int, where: str) -> None:
        """A point is reached: `where` goes on the sentence "hangs at step 17 in ...". Costs about a microsecond.

        Only at points that all ranks pass in the same order; elsewhere call `alive`.
        """
        last, beats, _ = self._mark
        self._mark = (step, beats + 1 if step == last else 1, where)
        self._moved = True

    def alive(self) -> None:
        """This rank works on, at something that other ranks have none or less of. From any thread."""
        self._moved = True

    def started(self) -> None:
        """The first step is done; step_seconds count from now on."""
        self._limit = self._step_seconds
        self._moved = True

    def __enter__(self) -> Watch:
        self._watched = threading.get_ident()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Takes leave; after a broken connection waits for the verdict, which ends the process."""
        if error is not None and self.world_size > 1 and _is_broken_connection(error):
            self._broken = (_one_line(error), time.monotonic())
            self._ended.wait()
        if error is None or isinstance(error, SystemExit):
            self._left = ""
        else:
            self._left = f"{type(error).__name__}: {_one_line(error)}"
        self._leave.set()
        for thread in self._threads:
            thread.join(self._patience)

    # ---- the threads

    def _keep_time(self) -> None:
        """Counts the seconds without progress; judges alone where the store does not answer."""
        before = time.monotonic()
        while not self._leave.wait(self._tick):
            now = time.monotonic()
            # Time in which this process was suspended does not count.
            self._clock += min(now - before, self._patience)
            before = now
            if self._moved:
                self._moved = False
                self._since = self._clock
            if self._clock - self._answered >= self._patience + self._tick:
                self._judge_alone()

    def _exchange(self) -> None:
        """Publishes this rank's sign of life, reads the others', and judges."""
        store: Store | None = None
        while True:
            try:
                store = store or self._connect(self._patience)
                self._publish(store)
                verdict = _get(store, _VERDICT) or self._judge(store)
                self._answered = self._clock
                if verdict is not None:
                    self._obey(verdict, store)
            except (RuntimeError, ValueError) as error:  # an answer may be cut off or that to an older question
                store, self._trouble = None, _one_line(error)
            if self._leave.wait(self._tick):
                break
        with suppress(RuntimeError, ValueError):
            if store is not None:
                self._publish(store)

    def _publish(self, store: Store) -> None:
        step, beats, where = self._mark
        place, waits = _place(self._watched)
        self._sign = replace(
            self._sign,
            serial=self._sign.serial + 1,
            step=step,
            beats=beats,
            where=where,
            idle=self._clock - self._since,
            limit=self._limit,
            place=place if self._left is None else "",
            waits=waits,
            left=self._left,
        )
        store.set(str(self.rank), json.dumps(asdict(self._sign)))

    def _judge(self, store: Store) -> dict[str, Any] | None:
        """What is wrong with the job, agreed by all ranks; None while nothing is."""
        idle = self._clock - self._since
        if self._broken is None and idle < self._limit / 2:
            self._seen.clear()
            return None
        signs = {rank: _Sign(**(_get(store, str(rank)) or {})) for rank in range(self.world_size)}
        for rank, sign in signs.items():
            if rank not in self._seen or self._seen[rank][0] != sign.serial:
                self._seen[rank] = (sign.serial, self._clock)
        if self._broken is None and idle < self._limit:
            return None

        patience = self._patience if self._broken else self._limit / 2 - 2 * self._tick
        silent = [
            rank
            for rank, (_, since) in self._seen.items()
            if signs[rank].left is None and rank != self.rank and self._clock - since >= patience
        ]
        failed = [rank for rank, sign in signs.items() if sign.left]
        here = [rank for rank, sign in signs.items() if sign.left is None and rank not in silent]
        if self._broken is not None:
            guilty = failed + silent
            if not guilty and time.monotonic() - self._broken[1] < 3 * self._patience:
                return None
        elif any(signs[rank].idle < signs[rank].limit for rank in here):
            return None
        else:
            guilty = sorted(failed + silent) or _furthest_behind({rank: signs[rank] for rank in here})
        speakers = [rank for rank in here if rank not in guilty] or here
        verdict = {
            "guilty": guilty,
            "speaker": min(speakers),
            "present": len(here),
            "step": max(signs[rank].step for rank in here),
            "text": self._describe(signs, guilty, silent, speakers),
        }
        # The first verdict counts, whoever gave it.
        return _parse(store.compare_set(_VERDICT, "", json.dumps(verdict)))

    def _judge_alone(self) -> None:
        """The same where the store does not answer: nobody can be asked, and each rank speaks for itself."""
        if self._broken is None and self._clock - self._since < self._limit:
            return
        step, _, where = self._mark
        address = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        text = (
            f"rank {self.rank} ({self._sign.host}) got no further than step {step} in {where} "
            f"({self._broken[0] if self._broken else self._idle_text()}), and the store of this launch on rank 0's "
            f"machine, {address}, cannot be reached ({self._trouble}): rank 0, its launcher or its machine is gone or "
            f"suspended; {self._how_to_go_on()}"
        )
        self._obey({"guilty": [], "speaker": self.rank, "step": step, "text": text}, None)

    def _describe(
        self, signs: dict[int, _Sign], guilty: Sequence[int], silent: Sequence[int], speakers: Sequence[int]
    ) -> str:
        others = [rank for rank in speakers if rank not in guilty]
        mine = self._mark
        if not guilty:
            assert self._broken is not None
            what = f"the connection between ranks broke at step {mine[0]} in {mine[2]}: {self._broken[0]}"
            return f"{what}; {self._how_to_go_on()}"
        first = signs[guilty[0]]
        hosts = ", ".join(sorted({signs[rank].host for rank in guilty}))
        who, plural = f"{_ranks(guilty)} ({hosts})", len(guilty) > 1
        at = f"step {first.step} in {first.where}" + (f" ({first.place})" if first.place else "")
        waited = "" if self._broken else f" for {self._idle_seconds():g} s"
        waiting = f"{_ranks(others)} waited{waited}"
        if first.left:
            what = f"{who} left at {at} with {first.left}; {waiting}"
        elif guilty[0] in silent:
            gone = "give no sign" if plural else "gives no sign"
            what = f"{who} {gone} of life since {at}: killed, suspended, or the machine is gone; {waiting}"
        else:
            waiting = f"; {_ranks(others)} wait{'s' if len(others) == 1 else ''}" if others else ""
            stacks = self.directory / (_stack_name(guilty[0]) if not plural else "hang-rank-*.txt")
            what = f"{who} hang{'' if plural else 's'} at {at}: {self._idle_text()}{waiting}; stack in {stacks}"
        return f"{what}; {self._how_to_go_on()}"

    def _idle_text(self) -> str:
        return f"no progress for {self._idle_seconds():g} s"

    def _idle_seconds(self) -> float:
        return round(self._clock - self._since, 1)

    def _how_to_go_on(self) -> str:
        newest = f"newest good checkpoint: {self.newest}; " if self.newest is not None else ""
        return f"{newest}start the same command again to go on from the newest good checkpoint"

    def _obey(self, verdict: dict[str, Any], store: Store | None) -> None:
        """Says or lets say, leaves the stacks, and ends; a file system that hangs too does not hold it up."""

        def last_words() -> None:
            if self.rank in verdict["guilty"]:
                with suppress(OSError), open(self.directory / _stack_name(self.rank), "w", encoding="utf-8") as file:
                    faulthandler.dump_traceback(file)
            if self.rank == verdict["speaker"]:
                self._say(verdict["text"], verdict["step"])
            # The first process to end makes the launcher kill the others, and rank 0 may take the store with it.
            if store is not None:
                store.add(_OBEYED, 1)
                while store.add(_OBEYED, 0) < verdict["present"]:
                    time.sleep(self._tick / 4)

        def try_last_words() -> None:
            with suppress(Exception):
                last_words()

        if not self._ending.acquire(blocking=False):
            return
        words = threading.Thread(target=try_last_words, name="last words", daemon=True)
        words.start()
        words.join(self._patience)
        self._leave.set()
        self._ended.set()
        self._end(EXIT_HANGING)


def _get(store: Store, key: str) -> dict[str, Any] | None:
    return _parse(store.get(key)) if store.check([key]) else None


def _parse(content: bytes) -> dict[str, Any]:
    """The record, as a ValueError if it is none."""
    record = json.loads(content)
    if not isinstance(record, dict):
        raise ValueError("not a record")
    return record


def _furthest_behind(signs: dict[int, _Sign]) -> list[int]:
    """Those with the least progress; of these, if only some wait for other ranks, the rest."""
    least = min((sign.step, sign.beats) for sign in signs.values())
    behind = [rank for rank, sign in signs.items() if (sign.step, sign.beats) == least]
    return [rank for rank in behind if not signs[rank].waits] or behind


def _place(thread: int) -> tuple[str, bool]:
    """`file.py:12 in function`, innermost in a thread, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "", False
    code, module = frame.f_code, str(frame.f_globals.get("__name__", ""))
    return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}", module.startswith(_WAITING)


def _is_broken_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another rank is gone; gloo raises plain RuntimeErrors."""
    gloo = isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    return isinstance(error, DistError) or gloo


def _one_line(error: BaseException) -> str:
    """The first line of an error, without the source file and the advice that gloo adds."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\[\S*\] ", "", lines[0]).partition(". This is typically")[0] if lines else type(error).__name__


def _ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, or `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    names = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def _stack_name(rank: int) -> str:
    return f"hang-rank-{rank:05d}.txt"
