"""Runs that are killed at random points, that hang, and that lose a rank.

RETROFIT_KILLS says how often a run is killed: `make test` does it a few times, `make faults` 200 times.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from ctypes import c_int
from pathlib import Path
from typing import Any

import pytest

from retrofit.checkpoints import checkpoint
from retrofit.recipe import Recipe, dump_recipe
from retrofit.training.loop import train
from tests.training.runs import launch, read_log

MakeRecipe = Callable[..., Recipe]

KILLS = int(os.environ.get("RETROFIT_KILLS", "10"))
STATE = checkpoint.state_file(0, 1)


def state_digest(directory: Path) -> str:
    return str(checkpoint.read_manifest(directory)["files"][STATE]["sha256"])


def test_a_run_killed_at_random_points_loses_nothing_and_ends_bit_identical(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Half of the kills fall inside a save. After each, the newest good checkpoint is the uninterrupted run's own."""
    steps = 40 + 8 * KILLS
    options = (
        f"--training.max_steps={steps}", "--training.save_steps=1", "--training.documents_per_step=2",
        "--training.logging_steps=5", "--training.ema_decay=0.9",
    )  # fmt: skip
    digests: dict[int, str] = {}

    def note(where: str, step: int, subject: Any = None) -> None:
        if where == "save.done" and checkpoint.step_of(subject):
            digests[step] = state_digest(subject)

    train(make_recipe(tmp_path / "whole", *options, "--training.save_total_limit=2"), probe=note)
    assert len(digests) == steps

    run = tmp_path / "killed"
    recipe = make_recipe(run, *options, "--training.save_total_limit=3")
    # Raw: a child that is killed while it holds a lock would never give it back.
    context = multiprocessing.get_context("fork")
    saving, committed, started = (context.RawValue(c_int, 0) for _ in range(3))

    def watch(where: str, step: int, subject: Any = None) -> None:
        started.value += where == "updated"
        if where == "save.begin":
            saving.value = 1
        elif where == "save.done":
            committed.value, saving.value = step, 0

    draw = random.Random(0)
    inside = lost = 0
    for kill in range(KILLS):
        started.value = saving.value = 0
        child = context.Process(target=train, args=(recipe,), kwargs={"probe": watch})
        child.start()
        while child.is_alive() and not started.value:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.05))
        if kill % 2:
            while child.is_alive() and not saving.value:
                pass
            time.sleep(draw.uniform(0, 0.004))
        child.kill()
        child.join()
        if child.exitcode == 0:
            pytest.fail("the run was over before it had been killed often enough")
        inside += saving.value
        newest, _ = checkpoint.latest(run / "checkpoints")
        if committed.value and (newest is None or int(newest.name[5:]) < committed.value):
            lost += 1
        assert newest is None or state_digest(newest) == digests[int(newest.name[5:])]
    train(recipe)
    print(f"measured: {KILLS} kills, {inside} of them inside a save, {lost} checkpoints lost, {steps} steps")
    assert lost == 0 and inside >= KILLS // 2
    last = checkpoint.step_name(steps)
    assert state_digest(run / "checkpoints" / last) == state_digest(tmp_path / "whole" / "checkpoints" / last)
    assert read_log(run) == read_log(tmp_path / "whole")


@pytest.mark.parametrize("fault", ["hanging", "killed"])
def test_a_rank_that_hangs_or_dies_is_named_and_the_others_end_in_time(
    make_recipe: MakeRecipe, tmp_path: Path, fault: str, capfd: Any
) -> None:
    name = f"run-{fault}"
    recipe = make_recipe(
        tmp_path / name,
        "--training.save_steps=1",
        "--training.step_timeout_minutes=0.05",
        "--training.start_timeout_minutes=1.0",
    )
    dump_recipe(recipe, tmp_path / f"{name}.yaml")
    began = time.monotonic()
    with pytest.raises((AssertionError, subprocess.SubprocessError)) as failure:
        launch("ddp", tmp_path, [name])
    seconds = time.monotonic() - began
    said = str(failure.value)
    outcome = json.loads((tmp_path / name / "outcome.json").read_text())
    print(f"measured: {fault}: {seconds:.0f} s from launch to end; {outcome['reason']}")
    if fault == "hanging":
        assert outcome["exit_code"] == 4 and "rank 1" in outcome["reason"] and "step 3" in outcome["reason"]
        assert "rank 1" in said
    assert seconds < 60
    newest, passed_over = checkpoint.latest(tmp_path / name / "checkpoints")
    assert newest is not None and newest.name in ("step-00000001", "step-00000002") and passed_over == []
    train(recipe)
    shutil.rmtree(tmp_path / name)
