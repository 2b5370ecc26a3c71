"""Saves by one rank and by four (threads that share a directory, as hosts share a file system), whole and failing."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.saving import Content, Outcome, Saver
from retrofit.checkpoints.tensor_file import write_tensors
from retrofit.probe import Probe, no_probe
from tests.faults import Fault, disk_full, read_only, stale_handle
from tests.saves import save_now

WORLD = 4


def content(rank: int, world_size: int = WORLD) -> dict[str, Content]:
    files: dict[str, Content] = {checkpoint.state_file(rank, world_size): {f"master/w{rank}": torch.arange(5.0) + rank}}
    if rank == 0:
        files[checkpoint.STATE_RECORD] = b'{"world_size": %d}' % world_size
    return files


def at(where: str, do: Fault) -> Probe:
    def probe(passed: str, step: int, subject: Any = None) -> None:
        if passed == where:
            do(subject)

    return probe


class Job:
    """Four ranks that save together."""

    def __init__(self, faults: Mapping[int, Probe] | None = None, time_out: float = 10.0) -> None:
        self.savers = [Saver(rank, WORLD, (faults or {}).get(rank, no_probe), time_out) for rank in range(WORLD)]

    def save(self, directory: Path, silent: int | None = None) -> Outcome:
        for saver in self.savers:
            if saver.rank != silent:
                saver.begin(directory, 1, content(saver.rank))
        outcomes = [saver.wait() for saver in self.savers]
        self.savers[0].clear()
        assert outcomes[0] is not None and all(saver.poll() is None for saver in self.savers)
        return outcomes[0]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_four_ranks_write_one_checkpoint(tmp_path: Path) -> None:
    outcome = Job().save(tmp_path / "step-00000001")
    assert outcome.problem is None and outcome.bytes == sum(
        path.stat().st_size for path in outcome.directory.iterdir() if path.name != checkpoint.MANIFEST
    )
    assert names(tmp_path) == ["step-00000001"] and checkpoint.find_problem(outcome.directory) is None
    tensors, record, _ = checkpoint.open_state(outcome.directory)
    assert record["world_size"] == 4 and sorted(tensors.shapes) == [f"master/w{rank}" for rank in range(4)]
    assert all(torch.equal(tensors.read(f"master/w{rank}"), torch.arange(5.0) + rank) for rank in range(4))


def test_shares_are_disjoint_and_all_of_the_files(tmp_path: Path) -> None:
    outcome = Job().save(tmp_path / "step-00000001")
    shares = checkpoint.shares(outcome.directory, 3)
    assert sorted(name for share in shares for name in share) == sorted(
        checkpoint.read_manifest(outcome.directory)["files"]
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("where", "fault", "said"),
    [
        ("save.block", disk_full, "No space left on device"),
        ("save.block", read_only, "Read-only file system"),
        ("save.begin", disk_full, "No space left on device"),
        ("save.file", lambda path: path.write_bytes(b"other"), "reads back differently"),
        ("save.manifest", disk_full, "No space left on device"),
        ("save.rename", stale_handle, "Stale file handle"),
        ("save.rename", lambda path: shutil.rmtree(path.parent), "No such file or directory"),
    ],
)
def test_a_save_that_fails_leaves_nothing_and_the_next_one_succeeds(
    tmp_path: Path, rank: int, where: str, fault: Fault, said: str
) -> None:
    folder = tmp_path / "checkpoints"
    assert Job().save(folder / "step-00000001").problem is None
    job = Job({rank: at(where, fault)}, time_out=1.0)
    outcome = job.save(folder / "step-00000002")
    if rank > 0 and where in ("save.manifest", "save.rename"):
        assert outcome.problem is None  # only rank 0 commits
        return
    assert outcome.problem is not None and "\n" not in outcome.problem
    if not (rank > 0 and where == "save.begin"):  # a rank that cannot even say so is missed
        assert said in outcome.problem
    if folder.is_dir():
        assert names(folder) == ["step-00000001"]
        assert checkpoint.find_problem(folder / "step-00000001") is None
    assert Job().save(folder / "step-00000002").problem is None


def test_a_rank_that_writes_nothing_is_named_after_the_time_out(tmp_path: Path) -> None:
    outcome = Job(time_out=0.3).save(tmp_path / "step-00000001", silent=3)
    assert outcome.problem is not None and "rank 3 wrote nothing" in outcome.problem
    assert names(tmp_path) == []


def test_a_rank_whose_disk_is_full_leaves_its_reason_in_the_room_that_its_files_took(tmp_path: Path) -> None:
    """The disk takes rank 2's part only once its other files are gone."""
    crowded = [False]

    def probe(where: str, step: int, subject: Any = None) -> None:
        if where == "save.file":
            crowded[0] = True
            disk_full(subject)
        if where == "save.part" and crowded[0] and list(subject.glob("training_state-00003*")):
            disk_full(subject)

    outcome = Job({2: probe}, time_out=5.0).save(tmp_path / "step-00000001")
    assert outcome.problem is not None and outcome.problem.startswith("rank 2: No space left on device")
    assert names(tmp_path) == []


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    outcome = Job({2: at("save.block", disk_full)}).save(tmp_path / "step-00000001")
    assert outcome.problem == f"rank 2: No space left on device ({checkpoint.state_file(2, WORLD)})"


def test_two_ranks_that_write_one_file_are_refused(tmp_path: Path) -> None:
    job = Job()
    for saver in job.savers:
        saver.begin(tmp_path / "step-00000001", 1, {"a.json" if saver.rank < 2 else f"{saver.rank}.json": b"{}"})
    outcomes = [saver.wait() for saver in job.savers]
    job.savers[0].clear()
    problems = (
        "rank 1 wrote a.json, as another rank did",
        "a.json reads back differently from what was written",  # it was read while the other rank wrote it
    )
    assert outcomes[0] is not None and outcomes[0].problem in problems
    assert names(tmp_path) == []


def test_whatever_ends_the_thread_is_an_outcome_and_never_the_one_before(tmp_path: Path) -> None:
    def leave(_: Any) -> None:
        raise SystemExit("left")

    def at_the_second(where: str, step: int, subject: Any = None) -> None:
        if where == "save.block" and step == 2:
            leave(subject)

    saver = Saver(0, 1, at_the_second)
    for step, problem in ((1, None), (2, "left"), (3, None)):
        directory = tmp_path / checkpoint.step_name(step)
        saver.begin(directory, step, content(0, 1))
        outcome = saver.wait()
        assert outcome is not None and (outcome.directory, outcome.problem) == (directory, problem)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_a_run_that_was_deleted_is_not_made_anew_by_a_save(tmp_path: Path) -> None:
    saver = Saver(0, 1)
    saver.begin(tmp_path / "unmounted" / "run" / "checkpoints" / "step-00000001", 1, content(0, 1))
    outcome = saver.wait()
    assert outcome is not None and outcome.problem is not None and "No such file or directory" in outcome.problem
    assert names(tmp_path) == []


def test_a_rotation_that_fails_is_a_remark_and_not_a_failed_save(tmp_path: Path) -> None:
    saver = Saver(0, 1)
    saver.begin(tmp_path / "step-00000001", 1, content(0, 1), then=stale_handle)
    outcome = saver.wait()
    assert outcome is not None and outcome.problem is None and "Stale file handle" in (outcome.remark or "")


def test_an_aborted_save_ends_at_once(tmp_path: Path) -> None:
    job = Job(time_out=60.0)
    for saver in job.savers[:3]:
        saver.begin(tmp_path / "step-00000001", 1, content(saver.rank))
    job.savers[0].abort("rank 3: out of order")
    outcome = job.savers[0].wait()
    for saver in job.savers[1:]:
        saver.wait()
    job.savers[0].clear()
    assert outcome is not None and outcome.problem == "rank 3: out of order" and names(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        save_now(tmp_path / "file" / "step-00000001", content(0, 1))


def _save_under_a_limit(folder: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        save_now(folder / "step-00000002", {"model.safetensors": {"w": torch.zeros(1 << 20)}})
    except OSError as error:
        os._exit(7 if "File too large" in str(error) else 1)
    os._exit(0)


def test_a_real_limit_on_file_size_leaves_nothing(tmp_path: Path) -> None:
    save_now(tmp_path / "step-00000001", content(0, 1))
    process = multiprocessing.get_context("fork").Process(target=_save_under_a_limit, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 7 and names(tmp_path) == ["step-00000001"]


def test_a_file_is_what_safetensors_reads_and_its_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(7).bfloat16(),
        "odd": torch.arange(3, dtype=torch.uint8),
        "long": torch.arange(4),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5),
    }
    blocks: list[int] = []
    digest = write_tensors(tmp_path / "x.safetensors", tensors, lambda: blocks.append(1))
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() and len(blocks) == 6
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor)


def test_a_checkpoint_that_is_being_read_is_not_rotated_away(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_now(tmp_path / checkpoint.step_name(step), content(0, 1))
    with checkpoint.reading(tmp_path / "step-00000001"):
        checkpoint.rotate(tmp_path, 2, tmp_path / "step-00000004")
        assert names(tmp_path) == ["step-00000001", "step-00000003", "step-00000004"]
    checkpoint.rotate(tmp_path, 2, tmp_path / "step-00000004")
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_checkpoints_at_multiples_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 8):
        save_now(tmp_path / checkpoint.step_name(step), content(0, 1))
    checkpoint.rotate(tmp_path, 2, tmp_path / "step-00000007", every=3)
    assert [path[-1] for path in names(tmp_path)] == ["3", "5", "6", "7"]
