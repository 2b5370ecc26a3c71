from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retrofit.training.run_directory import RunDirectory

HOLD = """
import sys, time
from pathlib import Path
from retrofit.training.run_directory import RunDirectory
RunDirectory(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_held_directory_is_refused_by_the_holders_name_until_it_dies(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"in use by process {holder.pid} on ") as refusal:
            run.acquire()
        assert str(run.path) in str(refusal.value) and "\n" not in str(refusal.value)
        holder.kill()
    dead = run.acquire()
    assert dead is not None and f"process {holder.pid} on " in dead
    run.release()
    assert run.acquire() is None
    run.release()


def test_a_directory_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="thesis.tex"):
        RunDirectory(tmp_path).acquire()


def test_the_log_is_strict_json_whatever_the_numbers(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append({"step": 1, "loss": float("nan"), "nested": {"norm": [float("inf"), 1.5]}})
    line = (tmp_path / "log.jsonl").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {"step": 1, "loss": "nan", "nested": {"norm": ["inf", 1.5]}}


def test_lines_past_the_resumed_step_and_a_torn_one_are_set_aside_not_lost(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (1, 2, 3):
        run.append({"step": step})
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 4, "lo')
    before = (tmp_path / "log.jsonl").read_text()
    aside = run.set_aside(2)
    assert aside is not None and aside.name == "log-superseded-1.jsonl"
    assert (tmp_path / "log.jsonl").read_text() + aside.read_text() == before + "\n"
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2]
    assert run.set_aside(2) is None
    run.append({"step": 3})
    second = run.set_aside(2)
    assert second is not None and second.name == "log-superseded-2.jsonl"
