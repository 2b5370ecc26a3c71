from __future__ import annotations

import io
from pathlib import Path

import pytest

from retrofit.training import log

RECORD = {
    "loss": 1.5, "unmasking": 1.0, "insertion": 0.5, "gradient_norm": 2.0, "tokens_per_second": 12345.0, "mfu": None,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_is_not_spammed_and_the_last_step_is_shown() -> None:
    stream = io.StringIO()
    progress = log.Progress(0, 100, stream)
    for step in range(1, 101):
        progress.show({"step": step, **RECORD})
    lines = stream.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    assert "loss 1.5 (unmasking 1, insertion 0.5)" in lines[0] and "12,345 tokens/s" in lines[0] and "left" in lines[0]


def test_each_kind_of_note_is_held_back_for_itself() -> None:
    stream = io.StringIO()
    progress = log.Progress(0, 9, stream)
    for step in (3, 6, 9):
        progress.note("held out", step, "loss 1")
        progress.note("sample", step, "'ab'")
    assert stream.getvalue().splitlines() == [
        "step 3, held out: loss 1", "step 3, sample: 'ab'", "step 9, held out: loss 1", "step 9, sample: 'ab'"
    ]  # fmt: skip


def test_a_terminal_has_one_line_that_rewrites_itself() -> None:
    stream = Terminal()
    progress = log.Progress(0, 100, stream)
    progress.show({"step": 1, **RECORD})
    progress.show({"step": 2, **RECORD})
    assert stream.getvalue().count("\r") == 2 and "\n" not in stream.getvalue()
    progress.say("held-out")
    assert stream.getvalue().endswith("\nheld-out\n")


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="report_to: wandb is not installed; pip install wandb"):
        log.check_trackers(["wandb"])


def test_wandb_without_a_key_is_refused_without_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match="wandb has no key"):
        log.check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_MODE", "offline")
    log.check_trackers(["wandb"])


def test_times_are_readable() -> None:
    assert [log.format_seconds(s) for s in (5, 125, 3723)] == ["0:05", "2:05", "1:02:03"]
