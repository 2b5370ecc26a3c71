from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from retrofit.training.guard import NotFinite, Preempted
from retrofit.training.outcome import OUTCOME, VARIABLE, Outcome


def outcome_of(directory: Path, error: BaseException | None, **attributes: object) -> dict[str, object]:
    try:
        with Outcome(0) as outcome:
            outcome.belongs_to(directory)
            for name, value in attributes.items():
                setattr(outcome, name, value)
            if error is not None:
                raise error
    except BaseException as caught:
        assert caught is error
    record: dict[str, object] = json.loads((directory / OUTCOME).read_text())
    return record


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (None, 0, "complete"),
        (Preempted(), 75, "stopped by SIGUSR1"),
        (NotFinite(), 3, "loss is nan"),
        (ValueError("training.output_dir: in use\nby another"), 2, "training.output_dir: in use"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device"),
        (SystemExit(2), 2, "refused; the log says why"),
        (SystemExit(), 0, "complete"),
        (SystemExit("no"), 1, "SystemExit"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("shapes"), 1, "shapes"),
        (AssertionError(), 1, "AssertionError"),
    ],
)
def test_the_exit_code_and_the_reason_are_those_that_ended_the_run(
    tmp_path: Path, error: BaseException | None, code: int, reason: str
) -> None:
    said = reason if code in (75, 3) else None
    record = outcome_of(tmp_path, error, step=12, reason=said)
    assert list(record) == ["exit_code", "reason", "step", "time"]
    assert (record["exit_code"], record["reason"], record["step"]) == (code, reason, 12)
    assert [path.name for path in tmp_path.iterdir()] == [OUTCOME]


def test_a_shell_can_read_the_exit_code(tmp_path: Path) -> None:
    outcome_of(tmp_path, Preempted(), reason='a "quoted"\nreason')
    command = r"""sed -n 's/^{"exit_code": \([0-9]*\).*/\1/p' "$0" """
    done = subprocess.run(["bash", "-c", command, tmp_path / OUTCOME], capture_output=True, text=True, check=True)
    assert done.stdout == "75\n"
    assert r"sed -n 's/^{" in (Path(__file__).parents[2] / "retrofit/training/outcome.py").read_text()


def test_an_old_outcome_is_removed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / OUTCOME).write_text("old")
    with Outcome(0) as outcome:
        assert (tmp_path / OUTCOME).exists()  # as yet it may be another run's
        outcome.belongs_to(tmp_path)
        assert not (tmp_path / OUTCOME).exists()


def test_a_run_that_never_had_its_directory_writes_to_the_batch_scripts_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "slurm 7.json"
    own.write_text("old")
    monkeypatch.setenv(VARIABLE, str(own))
    with pytest.raises(ValueError), Outcome(0):
        assert not own.exists()
        raise ValueError("training.output_dir: is in use")
    assert json.loads(own.read_text())["exit_code"] == 2
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_other_ranks_write_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    (tmp_path / OUTCOME).write_text("rank 0's")
    with Outcome() as outcome:
        outcome.belongs_to(tmp_path)
    assert (tmp_path / OUTCOME).read_text() == "rank 0's"
    outcome.write(4, "rank 0 hangs", 9)
    assert json.loads((tmp_path / OUTCOME).read_text())["exit_code"] == 4


def test_an_outcome_that_cannot_be_written_is_said_and_hides_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(Preempted), Outcome(0) as outcome:
        outcome.belongs_to(tmp_path / "nowhere")
        raise Preempted
    assert "outcome.json could not be written" in capsys.readouterr().err


def test_a_token_in_an_error_is_not_written(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 9
    outcome_of(tmp_path, RuntimeError(f"401 for {token}"))
    assert token not in (tmp_path / OUTCOME).read_text()
