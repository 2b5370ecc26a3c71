"""Going on: from where, with what changed, after which interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from retrofit.checkpoints import checkpoint
from retrofit.cli import main
from retrofit.recipe import Recipe
from retrofit.training.loop import train
from retrofit.training.opening import Request
from tests.faults import Fault, disk_full, fail_at, send, spoil
from tests.training.test_loop import assert_equal_runs, interrupted_copy, read_log, snapshot, step_directory

MakeRecipe = Callable[..., Recipe]

# An epoch of 56 documents ends within step 7.
OPTIONS = (
    "--training.max_steps=9", "--training.ema_decay=0.9", "--training.eval_steps=3", "--training.sample_steps=4",
    "--training.gradient_accumulation_steps=2", "--sampling.steps=4",
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("resume") / "whole"
    train(make_recipe(run, *OPTIONS))
    return run


@pytest.mark.parametrize(
    ("where", "step", "after", "workers"),
    [
        ("start", 1, 0, 0),
        ("forward", 1, 0, 0),
        ("forward", 5, 1, 0),  # the second of two micro-batches
        ("backward", 7, 0, 0),  # an epoch ends in this step
        ("agree", 8, 0, 0),
        ("update", 3, 0, 0),  # measured at this step, after the save
        ("evaluate", 4, 0, 0),  # within the held-out loss of step 3
        ("sample", 5, 0, 0),  # within the samples of step 4
        ("save", 7, 0, 0),
        ("forward", 9, 0, 0),  # the last step
        ("forward", 5, 1, 2),
        ("forward", 7, 0, 2),
        ("evaluate", 4, 0, 2),
        ("forward", 9, 0, 2),
    ],
)
def test_a_signal_at_any_moment_costs_nothing(
    make_recipe: MakeRecipe, whole: Path, tmp_path: Path, where: str, step: int, after: int, workers: int
) -> None:
    recipe = make_recipe(tmp_path / "run", *OPTIONS, f"--data.num_workers={workers}")
    with pytest.raises(SystemExit) as stop:
        train(recipe, probe=fail_at(0, step, where, send(signal.SIGTERM), after=after))
    assert stop.value.code == 75
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 75
    train(recipe)
    assert_equal_runs(tmp_path / "run", whole, 9)
    assert (tmp_path / "run" / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()


def test_the_time_limit_is_a_signal_that_nobody_has_to_send(
    make_recipe: MakeRecipe, whole: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(tmp_path / "run", *OPTIONS, "--training.stop_after_minutes=0.0001")
    with pytest.raises(SystemExit) as stop:
        train(recipe)
    assert stop.value.code == 75
    assert "the time limit" in json.loads((tmp_path / "run" / "outcome.json").read_text())["reason"]
    train(make_recipe(tmp_path / "run", *OPTIONS))
    assert_equal_runs(tmp_path / "run", whole, 9)


def test_resume_from_a_step_sets_later_checkpoints_aside(make_recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    train(make_recipe(tmp_path / "run", *OPTIONS), Request(resume_from="4"))
    assert_equal_runs(tmp_path / "run", whole, 9)
    aside = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("superseded-*"))
    assert aside == [f"superseded-1-step-0000000{step}" for step in (6, 8, 9)]


@pytest.mark.parametrize("name", ["", "checkpoints/step-00000004"])
def test_resume_from_another_run_goes_on_here(
    make_recipe: MakeRecipe, whole: Path, tmp_path: Path, name: str, capfd: Any
) -> None:
    interrupted_copy(whole, tmp_path / "old", 6)
    before = snapshot(tmp_path / "old")
    train(make_recipe(tmp_path / "new", *OPTIONS), Request(resume_from=str(tmp_path / "old" / name)))
    assert snapshot(tmp_path / "old") == before
    ours, theirs = (checkpoint.read_manifest(step_directory(run, 9)) for run in (tmp_path / "new", whole))
    name_of_state = checkpoint.state_file(0, 1)
    assert ours["files"][name_of_state] == theirs["files"][name_of_state]
    assert f"resuming {step_directory(tmp_path / 'old', 4 if name else 6)}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("5", "there is no .*step-00000005; steps of this run: 2, 4, 6, 8, 9"),
        ("nowhere", "there is no nowhere"),
        ("OTHER", "holds a run of its own"),
        ("BROKEN", "does not verify"),
    ],
)
def test_what_cannot_be_resumed_from_is_refused_and_changes_nothing(
    make_recipe: MakeRecipe, whole: Path, tmp_path: Path, asked: str, message: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shutil.copytree(whole, tmp_path / "other")
    if asked == "BROKEN":
        (step_directory(run, 4) / "training_state.json").write_text("{}")
        asked = "4"
    before = snapshot(run)
    with pytest.raises(ValueError, match=message):
        train(make_recipe(run, *OPTIONS), Request(resume_from=asked.replace("OTHER", str(tmp_path / "other"))))
    assert snapshot(run) == before


def test_a_fresh_start_moves_the_old_run_aside(make_recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    train(make_recipe(tmp_path / "run", *OPTIONS, "--training.seed=1"), Request(fresh=True))
    assert read_log(tmp_path / "run" / "previous-1") == read_log(whole) != read_log(tmp_path / "run")
    assert checkpoint.find_problem(step_directory(tmp_path / "run" / "previous-1", 9)) is None


def test_an_overridden_field_is_recorded_and_a_fixed_one_is_not_to_be_had(
    make_recipe: MakeRecipe, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted_copy(whole, run, 4)
    recipe = make_recipe(run, *OPTIONS[1:], "--optimizer.learning_rate=0.005", "--training.max_steps=7")
    with pytest.raises(ValueError, match="optimizer.learning_rate is 0.005 and was 0.01, training.max_steps is 7"):
        train(recipe, Request(overrides=("training.seed",)))
    train(recipe, Request(overrides=("optimizer.learning_rate", "training.max_steps")))
    assert [(line["field"], line["was"], line["is"]) for line in read_log(run) if line["kind"] == "override"] == [
        ("optimizer.learning_rate", 0.01, 0.005), ("training.max_steps", 9, 7),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="start a new stage"):
        train(make_recipe(run, *OPTIONS), Request(overrides=("lora.r",)))


def test_a_step_that_diverges_can_be_skipped(make_recipe: MakeRecipe, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        train(make_recipe(run, *OPTIONS), probe=fail_at(0, 6, "forward", spoil))
    said = capfd.readouterr().err
    assert stop.value.code == 3 and "step 6: loss is nan (draws 40 to 47; not finite: the loss of draws" in said
    assert f"last good checkpoint: {step_directory(run, 4)}" in said
    train(
        make_recipe(run, *OPTIONS, "--training.skip_steps=[6]"), probe=fail_at(0, 6, "forward", spoil)
    )  # never reached
    log = read_log(run)
    assert [line["draws"] for line in log if line["kind"] == "skipped"] == [[40, 47]]
    assert [line["step"] for line in log if line["kind"] == "train"] == [1, 2, 3, 4, 5, 7, 8, 9]
    record = checkpoint.read_record(step_directory(run, 9))
    assert record["adam_step"] == 8 and record["ordinals_consumed"] == 72


def remove(path: Path) -> Fault:
    return lambda _: shutil.rmtree(path)


def test_a_directory_that_vanishes_costs_checkpoints_and_not_the_run(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    train(make_recipe(run, *OPTIONS), probe=fail_at(0, 4, "save.block", remove(run / "checkpoints")))
    assert "step-00000004 could not be saved" in capfd.readouterr().err
    assert [path.name[-1] for path in checkpoint.steps_present(run / "checkpoints")] == ["6", "8", "9"]


def test_a_log_that_cannot_be_written_keeps_its_lines(make_recipe: MakeRecipe, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    aside = run / "aside"

    def block(_: Any) -> None:
        (run / "log.jsonl").rename(aside)
        (run / "log.jsonl").mkdir()

    def unblock(_: Any) -> None:
        (run / "log.jsonl").rmdir()
        aside.rename(run / "log.jsonl")

    def probe(where: str, step: int, subject: Any = None) -> None:
        if where == "update" and step in (5, 7):
            (block if step == 5 else unblock)(subject)

    train(make_recipe(run, *OPTIONS), probe=probe)
    assert read_log(run) == read_log(whole)


def test_a_disk_that_cannot_hold_a_checkpoint_is_refused_before_the_first_step(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Small:
        f_bavail, f_frsize = 1000, 512

    monkeypatch.setattr(os, "statvfs", lambda _: Small)
    with pytest.raises(ValueError, match=r"has 0\.51 MB free; one checkpoint takes 0\.\d\d MB and final/"):
        train(make_recipe(tmp_path / "run", *OPTIONS))
    assert not (tmp_path / "run" / "log.jsonl").exists()


def test_verify_tells_good_from_broken(whole: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(whole, tmp_path / "run")
    (step_directory(tmp_path / "run", 9) / "config.json").unlink()
    assert main(["verify", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "config.json is missing" in out and out.count(" good\n") == 5 and "goes on from step-00000008" in out
    assert main(["verify", str(step_directory(tmp_path / "run", 8))]) == 0
    assert main(["verify", str(step_directory(tmp_path / "run", 9))]) == 2
    assert main(["verify", str(tmp_path)]) == 2 and main(["verify", str(tmp_path / "nowhere")]) == 2


def test_a_full_disk_in_every_save_still_ends_with_weights(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"

    def probe(where: str, step: int, subject: Any = None) -> None:
        if where == "save.block" and "checkpoints" in str(subject):
            disk_full(subject)

    train(make_recipe(run, *OPTIONS), probe=probe)
    assert checkpoint.steps_present(run / "checkpoints") == [] and checkpoint.find_problem(run / "final") is None
    assert sum(line["kind"] == "save_failed" for line in read_log(run)) == 5
