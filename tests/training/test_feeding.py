"""Workers hand over the stream's own steps; one that fails is said in one line, whoever notices first."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from retrofit.data.stream import StepBatches
from retrofit.flexmdm.packing import pack
from retrofit.objective import MicroBatch
from retrofit.training.feeding import feed, naming_the_lost
from retrofit.training.outcome import Outcome


def micro_batch(step: int, gaps: bool = True) -> MicroBatch:
    return MicroBatch(
        packed=pack([[step, 6], []], slot=0),
        timesteps=torch.tensor([0.5, step], dtype=torch.float64),
        weights=torch.tensor([1.0, step], dtype=torch.float64),
        ordinals=torch.tensor([1, step]),
        mask_rows=torch.tensor([1]),
        targets=torch.tensor([step]),
        gaps=torch.tensor([step, 0, 0, 1]) if gaps else None,
    )


class Stream(Dataset[StepBatches]):
    """Steps of `size` micro-batches that hold the step's number; step 3 does what `at_three` says instead."""

    def __init__(self, size: int = 2, at_three: Exception | int | None = None) -> None:
        self.size, self.at_three = size, at_three

    def __getitem__(self, step: int) -> StepBatches:
        if step == 3 and isinstance(self.at_three, Exception):
            raise self.at_three
        if step == 3 and self.at_three is not None:
            os.kill(os.getpid(), self.at_three)
        return StepBatches([micro_batch(step, gaps=i % 2 == 0) for i in range(self.size)], [[4]] * self.size)


def tensors(step: StepBatches) -> Iterator[Tensor]:
    for batch in step.micro_batches:
        for record in (batch, batch.packed):
            yield from (v for f in fields(record) if isinstance(v := getattr(record, f.name), Tensor))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_steps_come_whole_and_in_order_from_any_number_of_workers(workers: int) -> None:
    steps = [0, 1, 2, 4, 5, 9, 7]
    found = list(feed(Stream(), steps, workers=workers, pin=False))
    assert len(found) == len(steps)
    for step, batches in zip(steps, found, strict=True):
        expected = Stream()[step]
        assert batches.rows == expected.rows
        pairs = list(zip(tensors(batches), tensors(expected), strict=True))
        assert len(pairs) == 2 * 8 - 1 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
        batches.micro_batches[0].timesteps.fill_(0)  # what was sent can be written to, as any tensor


def test_a_step_of_many_micro_batches_takes_no_more_file_descriptors_than_another() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        found = list(feed(Stream(size=200), range(4), workers=2, pin=False))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(step.micro_batches) for step in found] == [200] * 4


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "error", [ValueError("a document is too long"), OSError(5, "Input/output error", "tokens.npy")]
)
def test_an_error_of_the_users_arrives_as_it_was_raised(workers: int, error: Exception) -> None:
    batches = feed(Stream(at_three=error), range(6), workers=workers, pin=False)
    assert [next(batches).micro_batches[0].targets.item() for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as raised:
        next(batches)
    assert str(raised.value) == str(error) and raised.value.args == error.args


def test_a_bug_arrives_with_the_workers_traceback() -> None:
    batches = feed(Stream(at_three=ZeroDivisionError("by nought")), [3], workers=1, pin=False)
    with pytest.raises(ZeroDivisionError, match=r"(?s)by nought.*|in __getitem__") as raised:
        next(batches)
    assert "test_feeding.py" in str(raised.value)


def test_a_worker_that_is_killed_ends_the_process_with_one_line(capfd: Any) -> None:
    outcome = Outcome(0)
    before = set(multiprocessing.active_children())
    with pytest.raises(SystemExit) as stop, naming_the_lost(outcome):
        list(feed(Stream(at_three=signal.SIGKILL), range(6), workers=2, pin=False))
    assert set(multiprocessing.active_children()) <= before
    assert stop.value.code == 4
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("retrofit: DataLoader worker (pid")  # by the signal, or as "exited unexpectedly"
    assert "data.num_workers" in line and "start the same command again" in line
    assert outcome.reason is not None and outcome.reason in line


def test_an_error_of_the_trainers_leaves_no_worker_behind() -> None:
    """Python would wait for it at its end: held by the traceback, the loader ends it no sooner."""
    before = set(multiprocessing.active_children())
    with pytest.raises(KeyError) as raised, closing(feed(Stream(), range(50), workers=2, pin=False)) as batches:
        for _ in batches:
            workers = set(multiprocessing.active_children()) - before
            raise KeyError
    assert raised.tb is not None and len(workers) == 2 and not any(worker.is_alive() for worker in workers)


def test_other_errors_are_not_taken_for_a_lost_worker() -> None:
    with pytest.raises(RuntimeError, match="shapes do not match"), naming_the_lost(Outcome(0)):
        raise RuntimeError("shapes do not match")


def test_pinning_reaches_every_tensor_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to pin for without a GPU: each tensor that is asked becomes its negative."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: -tensor)
    step = Stream()[5]
    pinned = step.pin_memory()
    assert pinned.rows == step.rows
    for mine, theirs in zip(tensors(pinned), tensors(step), strict=True):
        assert torch.equal(mine, -theirs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 2])
def test_steps_for_a_gpu_lie_in_pinned_memory_and_arrive_there(workers: int) -> None:
    for step, batches in enumerate(feed(Stream(), range(4), workers=workers, pin=True)):
        assert all(tensor.is_pinned() for tensor in tensors(batches))
        moved = StepBatches([batch.to("cuda") for batch in batches.micro_batches], batches.rows)
        torch.cuda.synchronize()
        for mine, theirs in zip(tensors(moved), tensors(Stream()[step]), strict=True):
            assert mine.is_cuda and torch.equal(mine.cpu(), theirs)
