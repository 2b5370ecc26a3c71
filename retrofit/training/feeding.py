"""Steps drawn ahead of the devices by worker processes, and what is said when one of them fails.

Workers are forked once, ignore signals, hold no thread of their own, and end with the process that trains.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from retrofit.data.stream import StepBatches

from .guard import EXIT_HANGING, announce, ignore_signals
from .outcome import Outcome


def feed(
    stream: Dataset[StepBatches], steps: Sequence[int], *, workers: int, pin: bool
) -> Generator[StepBatches, None, None]:
    """`stream[step]` for each step, in order.

    To be closed by who leaves it early: the workers ignore the signal by which Python ends what still lives at its own
    end, and would be waited for without end.

    Args:
        workers: processes that draw steps ahead, two each; 0: steps are drawn when they are asked for.
        pin: in pinned memory, for a GPU.

    Raises:
        ValueError, OSError: of the stream, as it raised them.
        RuntimeError: a worker is gone; raised in the main thread wherever that is just then (see `naming_the_lost`).
    """
    loader: DataLoader[Any] = DataLoader(
        _Answering(stream),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=ignore_signals,
        pin_memory=pin,
        generator=torch.Generator(),  # or the loader would draw its seed from dropout's generator
    )
    answers = iter(loader)
    try:
        for answer in answers:
            answer = answer.open() if isinstance(answer, _Parcel) else answer
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        if workers:
            # Not left to the garbage collector: the traceback of an error may hold the loader for long.
            answers._shutdown_workers()  # type: ignore[attr-defined]


@contextmanager
def naming_the_lost(outcome: Outcome) -> Iterator[None]:
    """Ends the process with one line and EXIT_HANGING where a worker is gone.

    To be entered before the watch is, which tells the other ranks of the error.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split()).rstrip(".")
        if not text.startswith("DataLoader worker"):
            raise
        text += "; if memory ran out, lower data.num_workers; start the same command again to go on"
        outcome.reason = text
        announce(text)
        raise SystemExit(EXIT_HANGING) from None


@dataclass(frozen=True)
class _Answering(Dataset[Any]):
    """The stream, with a user's error as an answer: raised in a worker, its message would hold a traceback."""

    stream: Dataset[StepBatches]

    def __getitem__(self, step: int) -> StepBatches | Exception | _Parcel:
        answer: StepBatches | Exception
        try:
            answer = self.stream[step]
        except (ValueError, OSError) as error:
            answer = error
        return answer if get_worker_info() is None else _Parcel.of(answer)


@dataclass(frozen=True)
class _Parcel:
    """A worker's answer in one piece. Sent as tensors, each would take a file descriptor and shared memory."""

    content: bytes

    @classmethod
    def of(cls, answer: StepBatches | Exception) -> _Parcel:
        file = io.BytesIO()
        _Pickler(file, protocol=5).dump(answer)
        return cls(file.getvalue())

    def open(self) -> Any:
        return pickle.loads(self.content)

    def pin_memory(self) -> Any:
        """The contents, pinned; called by the loader, in a thread of its own."""
        answer = self.open()
        return answer if isinstance(answer, Exception) else answer.pin_memory()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, Tensor) else NotImplemented
