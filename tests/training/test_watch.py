"""The watch in real jobs of 1 to 4 processes over gloo (watched.py), and the parts that are easier seen in threads."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import retrofit
from retrofit.training.watch import Watch, launch_store

SECONDS = 1.5
"""Time-out in the jobs."""
MARGIN = 3.0
"""Seconds after the time-out by which all have ended. Measured: 0.1 to 0.2; the rest is for a machine under load."""

# Name (see watched.py) -> the rank that speaks, and what it says.
HARMS = {
    "sleep-2-3-launcher": (0, r"rank 2 \(.*\) hangs at step 3 in forward \(watched.py:\d+ in do\): no progress .*wait"),
    "sleep-0-2-rank0": (1, r"rank 0 \(.*\) hangs at step 3 in forward"),
    "sleep-3-4-rank0": (0, r"rank 3 \(.*\) hangs at step 3 in forward .*; ranks 0-2 wait; stack in "),
    "sleep-0-1-launcher": (0, r"rank 0 \(.*\) hangs at step 3 in forward"),
    "stop-1-3-launcher": (0, r"rank 1 \(.*\) gives no sign of life since step [23] in .*ranks 0, 2 waited"),
    "stop-0-2-launcher": (1, r"rank 0 \(.*\) gives no sign of life since step [23] in "),
    "stop-0-2-rank0": (1, r"rank 1 \(.*\) got no further than step 3 in backward .* the store .* cannot be reached"),
    "kill-1-3-launcher": (0, r"rank 1 \(.*\) gives no sign of life since step [23] in "),
    "kill-0-2-rank0": (1, r"rank 1 .* step 3 in backward \(.*[Cc]onnection.*\), and the store .* cannot be reached"),
    "raise-1-2-rank0": (0, r"rank 1 \(.*\) left at step 3 in forward with MemoryError: no memory for the batch"),
}
LEFT_ALONE = ["work-1-2-launcher", "suspend-1-2-rank0"]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What came of each job, from three processes that fork a third of them each."""
    root = tmp_path_factory.mktemp("watched")
    path = os.pathsep.join([str(Path(retrofit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(Path(__file__).with_name("watched.py")), str(root), str(SECONDS)]
    names = [*HARMS, *LEFT_ALONE]
    launched = [
        subprocess.Popen([*command, *names[i::3]], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for i in range(3)
    ]
    outcomes: dict[str, Any] = {}
    for process in launched:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()[-4000:]
        outcomes |= json.loads(output)
    return root, outcomes


@pytest.mark.parametrize("name", HARMS)
def test_the_rank_at_fault_is_named_once_and_all_end_in_time(jobs: tuple[Path, dict[str, Any]], name: str) -> None:
    root, outcomes = jobs
    outcome, (speaker, said) = outcomes[name], HARMS[name]
    harm, harmed = name.split("-")[0], int(name.split("-")[1])
    own = {"sleep": 4, "stop": None, "kill": -9, "raise": 1}[harm]
    assert outcome["codes"] == [own if rank == harmed else 4 for rank in range(len(outcome["codes"]))]
    assert outcome["seconds"] < SECONDS + MARGIN
    if harm in ("sleep", "stop"):
        assert outcome["seconds"] > 0.9 * SECONDS
    line = outcome["stderr"][speaker]
    step, _, text = line.partition("|")
    assert step == "3" and re.match(said, text) and text.count("\n") == 1
    assert "newest good checkpoint: run/checkpoints/step-00000002; start the same command again" in text
    assert [rank for rank, text in enumerate(outcome["stderr"]) if text] == [speaker]
    stacks = [path.name for path in (root / name).glob("hang-rank-*.txt")]
    assert stacks == ([f"hang-rank-{harmed:05d}.txt"] if harm == "sleep" else [])
    for stack in stacks:
        assert "in do" in (root / name / stack).read_text()


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_a_job_that_works_on_or_was_suspended_as_a_whole_is_left_alone(
    jobs: tuple[Path, dict[str, Any]], name: str
) -> None:
    outcome = jobs[1][name]
    assert outcome["codes"] == [0, 0] and outcome["stderr"] == ["done\n"] * 2
    assert outcome["seconds"] > 2 * SECONDS


class Ended(list[int]):
    """Stands for os._exit."""

    def __call__(self, code: int) -> Any:
        self.append(code)


def watches(count: int, directory: Path, **seconds: float) -> tuple[list[Watch], list[str], Ended]:
    """Watches of several ranks in one process, what they said, and how they ended."""
    store, said, ended = dist.HashStore(), list[str](), Ended()
    limits = {"step_seconds": 0.4, "start_seconds": 0.4} | seconds
    ranks = [
        Watch(
            lambda _: store,
            rank,
            count,
            directory=directory,
            say=lambda text, step: said.append(text),
            end=ended,
            **limits,
        )
        for rank in range(count)
    ]
    return ranks, said, ended


def wait_for(ended: Ended, count: int, seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while len(ended) < count and time.monotonic() < until:
        time.sleep(0.01)


def test_ranks_that_hang_together_are_all_named(tmp_path: Path) -> None:
    (first, second), said, ended = watches(2, tmp_path)
    with first, second:
        first.beat(7, "backward")
        second.beat(7, "backward")
        wait_for(ended, 2)
    assert ended == [4, 4] and len(said) == 1
    assert re.match(
        r"ranks 0-1 \(.*\) hang at step 7 in backward .*: no progress for [\d.]+ s; stack in .*\*.txt", said[0]
    )
    assert len(list(tmp_path.glob("hang-rank-*.txt"))) == 2


def test_of_ranks_at_one_point_the_one_that_does_not_wait_for_others_hangs(tmp_path: Path) -> None:
    from retrofit.training.watch import _furthest_behind, _Sign

    waiting, working = _Sign(step=3, beats=2, waits=True), _Sign(step=3, beats=2)
    assert _furthest_behind({0: waiting, 1: working, 2: waiting, 3: _Sign(step=3, beats=5)}) == [1]
    assert _furthest_behind({0: waiting, 1: waiting}) == [0, 1]
    assert _furthest_behind({0: _Sign(step=3, beats=1, waits=True), 1: working}) == [0]


def test_a_start_may_take_longer_than_a_step(tmp_path: Path) -> None:
    (watch,), said, ended = watches(1, tmp_path, step_seconds=0.3, start_seconds=60)
    with watch:
        watch.beat(1, "forward")
        time.sleep(0.8)
        assert ended == []
        watch.started()
        wait_for(ended, 1)
    assert ended == [4] and "step 1 in forward" in said[0]


def test_a_rank_that_has_left_well_is_not_blamed(tmp_path: Path) -> None:
    (first, second), said, ended = watches(2, tmp_path)
    with first:
        with second:
            second.beat(9, "the last save")
        first.beat(9, "the last save")
        wait_for(ended, 1)
    assert ended == [4] and said[0].startswith("rank 0 (")


def test_a_directory_that_cannot_be_written_does_not_hold_up_the_end(tmp_path: Path) -> None:
    (watch,), said, ended = watches(1, tmp_path / "nowhere")
    with watch:
        wait_for(ended, 1)
    assert ended == [4] and len(said) == 1


def test_a_store_that_never_answers_ends_the_rank_too(tmp_path: Path) -> None:
    said, ended, over = list[str](), Ended(), threading.Event()

    def connect(_: float) -> dist.Store:
        over.wait(60)
        raise RuntimeError

    watch = Watch(
        connect, 1, 2, step_seconds=0.4, start_seconds=0.4, directory=tmp_path,
        say=lambda text, step: said.append(text), end=ended,
    )  # fmt: skip
    with watch:
        wait_for(ended, 1)
        over.set()
    assert ended == [4] and "cannot be reached (no answer)" in said[0]


def test_a_beat_is_cheap(tmp_path: Path) -> None:
    watch = Watch(launch_store("", 1), 0, 1, step_seconds=60, start_seconds=60, directory=tmp_path, say=lambda *_: None)
    with watch:
        before = time.perf_counter()
        for _ in range(10_000):
            watch.beat(1, "forward")
        assert time.perf_counter() - before < 1  # measured: 3 ms
