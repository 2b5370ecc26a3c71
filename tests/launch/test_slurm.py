"""launch/slurm/train.sbatch with stand-ins for Slurm's commands and the launcher on the PATH.

The stand-in of srun starts one task a node and passes signals on to the tasks alone, as Slurm does with cgroups; with
`whole_tree` to everything that runs in them, as Slurm does otherwise. That of accelerate starts one training process,
which takes its orders from the environment.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import retrofit
from retrofit.recipe import Recipe, dump_recipe

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch/slurm/train.sbatch"

SCONTROL = """
if [[ $1 == show ]]; then printf '127.0.0.1\\nnode-b\\n'; else echo "scontrol $*" >> "$JOURNAL"; fi
"""
SQUEUE = 'echo "${JOB_STATE:-RUNNING}"'
SRUN = """
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
tasks=()
pass_on() {
    local task child  # the loops below have a task of their own, which a trap would change under them
    for task in "${tasks[@]}"; do
        if [[ -n ${WHOLE_TREE:-} ]]; then
            for child in $(pgrep -P "$task"); do pkill -USR1 -P "$child"; kill -USR1 "$child"; done
        fi
        kill -USR1 "$task"
    done
}
trap pass_on USR1
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
status=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
    wait "$task" || status=$?
done
exit "$status"
"""
# torchrun, too, exits with 1 whatever its processes exit with. Its training process is its child.
ACCELERATE = """
printf '%s\\n' "$SLURM_NODEID" "$@" > "arguments-$SLURM_NODEID"
"$STAND_INS/training" -m retrofit.train & training=$!
trap 'echo terminated >> "$JOURNAL"; kill $training; exit 1' TERM
wait "$training" || exit 1
"""
# Python, since a shell cannot trap what its launcher ignores.
TRAINING = """
import os, pathlib, signal, sys, time
node, order = os.environ["SLURM_NODEID"], os.environ["ORDER"]

def write(code):
    if node == "0":
        pathlib.Path(os.environ["RETROFIT_OUTCOME"]).write_text('{"exit_code": %d, "reason": "x"}' % code)
    sys.exit(code)

def save(*_):
    with open(os.environ["JOURNAL"], "a") as journal:
        journal.write(f"asked on node {node}\\n")
    time.sleep(0.2)
    write(75)

signal.signal(signal.SIGUSR1, save)
pathlib.Path(f"running-{node}").touch()
if order == "wait":
    time.sleep(60)
elif order == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
write(0 if order == "complete" else int(order))
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """The directory a job is submitted from, with spaces in its name and in its files'."""
    path = tmp_path / "my runs"
    path.mkdir()
    stand_ins = tmp_path / "stand-ins"
    stand_ins.mkdir()
    scripts = {"scontrol": SCONTROL, "squeue": SQUEUE, "srun": SRUN, "accelerate": ACCELERATE, "training": TRAINING}
    for name, body in scripts.items():
        program = sys.executable if name == "training" else "/usr/bin/env bash"
        (stand_ins / name).write_text(f"#!{program}\n{body}")
        (stand_ins / name).chmod(0o755)
    for name in ("launch file.yaml", "recipe one.yaml"):
        (path / name).touch()
    return path


def start(workplace: Path, order: str = "complete", *arguments: str, **environment: str) -> subprocess.Popen[str]:
    stand_ins = workplace.parent / "stand-ins"
    ours = {
        "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}", "STAND_INS": str(stand_ins), "ORDER": order,
        "JOURNAL": str(workplace / "journal"), "SLURM_JOB_ID": "4321", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8", **environment,
    }  # fmt: skip
    return subprocess.Popen(
        ["bash", str(SCRIPT), *(arguments or ("launch file.yaml", "recipe one.yaml", "--training.seed", "1"))],
        cwd=workplace, env=os.environ | ours, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(job: subprocess.Popen[str], seconds: float = 60) -> tuple[int, str]:
    output, _ = job.communicate(timeout=seconds)
    return job.returncode, output


def journal(workplace: Path) -> list[str]:
    path = workplace / "journal"
    return path.read_text().splitlines() if path.exists() else []


def wait_until(there: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.02)


def both_run(workplace: Path) -> bool:
    return all((workplace / f"running-{node}").exists() for node in range(2))


def test_every_node_gets_its_launcher_with_the_arguments_as_they_were_given(workplace: Path) -> None:
    code, output = finish(start(workplace))
    assert code == 0 and "complete" in output and journal(workplace) == []
    for node in range(2):
        number, *arguments = (workplace / f"arguments-{node}").read_text().splitlines()
        assert number == str(node)
        assert arguments == [
            "launch", "--config_file", "launch file.yaml", "--num_machines", "2", "--machine_rank", str(node),
            "--num_processes", "16", "--main_process_ip", "127.0.0.1", "--main_process_port", "14321",
            "--deepspeed_multinode_launcher", "standard", "-m", "retrofit.train", "recipe one.yaml",
            "--training.seed", "1",
        ]  # fmt: skip


@pytest.mark.parametrize("whole_tree", ["", "yes"])
@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_makes_the_ranks_save_and_the_job_is_requeued(workplace: Path, name: str, whole_tree: str) -> None:
    job = start(workplace, "wait", WHOLE_TREE=whole_tree)
    wait_until(lambda: both_run(workplace))
    job.send_signal(signal.Signals[name])
    code, output = finish(job)
    assert code == 75 and "saved and stopped; requeued" in output
    asked = [line for line in journal(workplace) if line.startswith("asked")]
    assert set(asked) == {"asked on node 0", "asked on node 1"}
    assert [line for line in journal(workplace) if line not in asked] == ["scontrol requeue 4321"]
    assert finish(start(workplace, "complete"))[0] == 0  # the requeued job


def test_a_time_limit_of_the_recipe_requeues_too(workplace: Path) -> None:
    assert finish(start(workplace, "75"))[0] == 75
    assert journal(workplace) == ["scontrol requeue 4321"]


@pytest.mark.parametrize("code", ["2", "3"])
def test_a_refused_or_diverged_run_is_not_requeued(workplace: Path, code: str) -> None:
    ended, output = finish(start(workplace, code))
    assert ended == int(code) and journal(workplace) == [] and "not requeued" in output and '"reason": "x"' in output


@pytest.mark.parametrize("order", ["4", "killed"])
def test_a_crash_is_requeued_up_to_the_limit_of_crashes_in_a_row(workplace: Path, order: str) -> None:
    for _ in range(2):
        code, output = finish(start(workplace, order, MAX_RESTARTS="2"))
        assert code == (4 if order == "4" else 1) and "requeued" in output
    assert journal(workplace) == ["scontrol requeue 4321"] * 2
    assert "given up" in finish(start(workplace, order, MAX_RESTARTS="2"))[1]
    assert journal(workplace) == ["scontrol requeue 4321"] * 2


def test_a_preemption_in_between_begins_the_count_of_crashes_anew(workplace: Path) -> None:
    for order in ("4", "75", "4"):
        finish(start(workplace, order, MAX_RESTARTS="1"))
    assert journal(workplace) == ["scontrol requeue 4321"] * 3


def test_an_outcome_of_an_earlier_start_is_not_taken_for_this_ones(workplace: Path) -> None:
    (workplace / "slurm-4321.outcome.json").write_text('{"exit_code": 75}\n')
    code, output = finish(start(workplace, "killed", MAX_RESTARTS="0"))
    assert code == 1 and "given up" in output and journal(workplace) == []


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", ""])
def test_a_job_that_slurm_has_ended_is_not_requeued_by_itself(workplace: Path, state: str) -> None:
    code, output = finish(start(workplace, "75", JOB_STATE=state or " "))
    assert code == 75 and journal(workplace) == [] and "the same sbatch command goes on from there" in output


def test_ranks_that_end_without_a_word_when_asked_do_not_count_as_a_crash(workplace: Path) -> None:
    """As Python does that has only just started."""
    (workplace.parent / "stand-ins" / "training").write_text(
        f"#!{sys.executable}\nimport os, pathlib, signal, time\nsignal.signal(signal.SIGUSR1, signal.SIG_DFL)\n"
        'pathlib.Path("running-" + os.environ["SLURM_NODEID"]).touch()\ntime.sleep(60)\n'
    )
    job = start(workplace, MAX_RESTARTS="0")
    wait_until(lambda: both_run(workplace))
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 75 and journal(workplace) == ["scontrol requeue 4321"]


@pytest.mark.parametrize("deaf", [0, 3])
def test_ranks_that_are_not_there_or_do_not_listen_yet_are_waited_for(workplace: Path, deaf: int) -> None:
    """A rank ignores the signal from its start, as its launcher does, until it sets its handler."""
    training = workplace.parent / "stand-ins" / "training"
    training.write_text(training.read_text().replace("signal.signal(", f"time.sleep({deaf})\nsignal.signal(", 1))
    accelerate = workplace.parent / "stand-ins" / "accelerate"
    accelerate.write_text(accelerate.read_text().replace("bash\n", "bash\ntouch early-$SLURM_NODEID; sleep 2\n", 1))
    job = start(workplace, "wait")
    wait_until(lambda: all((workplace / f"early-{node}").exists() for node in range(2)))
    job.send_signal(signal.SIGUSR1)
    assert finish(job)[0] == 75
    *asked, last = journal(workplace)
    assert sorted(asked) == ["asked on node 0", "asked on node 1"] and last == "scontrol requeue 4321"


@pytest.mark.parametrize("arguments", [("launch file.yaml",), ("launch file.yaml", "nowhere.yaml")])
def test_missing_arguments_or_files_are_refused_before_anything_starts(
    workplace: Path, arguments: tuple[str, ...]
) -> None:
    code, output = finish(start(workplace, "complete", *arguments))
    assert code == 2 and ("usage" in output or "nowhere.yaml: no such file" in output)
    assert not (workplace / "arguments-0").exists()


def test_the_script_parses_and_asks_slurm_for_signal_and_requeue() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    text = SCRIPT.read_text()
    for option in ("--signal=B:USR1@300", "--requeue", "--open-mode=append", "--nodes=2", "--gpus-per-node=8"):
        assert f"#SBATCH {option}\n" in text


def test_two_real_launchers_are_stopped_by_a_signal_after_saving(
    workplace: Path, make_recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Two "nodes" of one process each on this machine, with accelerate, torchrun and gloo as they are."""
    run = tmp_path / "run"
    recipe = make_recipe(run, "--training.max_steps=100000", "--training.save_steps=100000")
    dump_recipe(recipe, workplace / "recipe one.yaml")
    (workplace.parent / "stand-ins" / "accelerate").write_text(
        f'#!/usr/bin/env bash\nexec {sys.executable} -m accelerate.commands.accelerate_cli "$@"\n'
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join([str(Path(retrofit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = {
        "PROCESSES_PER_NODE": "1", "MASTER_PORT": str(port), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    arguments = (str(ROOT / "launch/accelerate/ddp.yaml"), "recipe one.yaml")
    job = start(workplace, "", *arguments, **environment)
    log = run / "log.jsonl"
    wait_until(lambda: job.poll() is not None or (log.exists() and len(log.read_text().splitlines()) > 2), 120)
    assert job.poll() is None, job.communicate()
    job.send_signal(signal.SIGUSR1)
    code, output = finish(job, 120)
    assert code == 75 and journal(workplace) == ["scontrol requeue 4321"], output
    record = json.loads((run / "outcome.json").read_text())
    assert record["exit_code"] == 75 and record["step"] > 2
    assert record == json.loads((workplace / "slurm-4321.outcome.json").read_text())
    assert (run / "checkpoints" / f"step-{record['step']:08d}").is_dir()
