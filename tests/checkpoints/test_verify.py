"""`retrofit verify`: what is said of a run's checkpoints, and the exit code."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from retrofit.checkpoints import checkpoint, verify
from retrofit.cli import main
from tests.saves import save_now


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        save_now(tmp_path / "run" / "checkpoints" / checkpoint.step_name(step), {"model.safetensors": bytes(1000)})
    return tmp_path / "run"


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / checkpoint.step_name(number)


def flip(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:500] + b"\1" + content[501:])


def test_each_checkpoint_has_a_line_and_the_newest_good_one_is_named(run: Path, capsys: Any) -> None:
    flip(step(run, 6) / "model.safetensors")
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["step-00000002", "step-00000004", "step-00000006"]
    assert lines[0].endswith("good") and lines[1].endswith("good")
    assert lines[2].endswith("model.safetensors differs from its SHA-256 in the manifest")
    assert lines[3:] == ["a resumed run goes on from step-00000004"]


def test_a_run_without_a_good_checkpoint_is_an_error(run: Path, capsys: Any) -> None:
    for number in (2, 4, 6):
        (step(run, number) / checkpoint.MANIFEST).unlink()
    assert main(["verify", str(run)]) == 2
    said = capsys.readouterr()
    assert said.out.count("manifest.json is missing") == 3 and "no checkpoint is good" in said.err


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.mkdir(), "neither a run nor a checkpoint"),
        (lambda path: (path / "checkpoints").mkdir(parents=True), "has no checkpoint yet"),
    ],
)
def test_where_there_is_nothing_to_verify_one_line_says_so(tmp_path: Path, make: Any, said: str, capsys: Any) -> None:
    make(tmp_path / "x")
    assert main(["verify", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_final_and_a_merged_base_are_verified_and_a_base_alone_is_no_checkpoint(run: Path, capsys: Any) -> None:
    save_now(run / "base", {"model.safetensors": bytes(10)})
    save_now(run / "final", {"model.safetensors": bytes(10)})
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().out.count("good\n") == 5
    shutil.rmtree(run / "checkpoints")
    assert main(["verify", str(run)]) == 0
    (run / "final" / "model.safetensors").unlink()
    assert main(["verify", str(run)]) == 2
    said = capsys.readouterr()
    assert "no checkpoint is good" in said.err and "model.safetensors is missing" in said.out


def test_leftovers_are_named_and_are_not_taken_for_checkpoints(run: Path, capsys: Any) -> None:
    step(run, 6).rename(run / "checkpoints" / ".writing-step-00000006-1")
    step(run, 4).rename(run / "checkpoints" / "broken-1-step-00000004")
    assert main(["verify", str(run)]) == 0
    out = capsys.readouterr().out
    assert ".writing-step-00000006-1" in out and "removed when the run goes on" in out
    assert "broken-1-step-00000004" in out and "goes on from step-00000002" in out


@pytest.mark.parametrize("inside", ["checkpoints/step-00000002", "base"])
def test_one_directory_with_a_manifest_can_be_verified(run: Path, inside: str, capsys: Any) -> None:
    save_now(run / "base", {"model.safetensors": bytes(1000)})
    assert main(["verify", str(run / inside)]) == 0
    flip(run / inside / "model.safetensors")
    assert main(["verify", str(run / inside)]) == 2
    said = capsys.readouterr()
    assert "good\n" in said.out and "differs from its SHA-256" in said.out and "no checkpoint is good" in said.err


def test_progress_is_shown_where_reading_takes_long(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["verify", str(run)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(verify, "_QUIET_SECONDS", {True: -1.0, False: -1.0})
    assert main(["verify", str(run)]) == 0
    assert "reading step-00000002: 0.0 of 0.0 GB" in capsys.readouterr().err
