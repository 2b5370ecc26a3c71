from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.saving import save_now

STATE = checkpoint.state_file(0, 1)


def write_step(checkpoints: Path, step: int) -> Path:
    directory = checkpoints / checkpoint.step_name(step)

    save_now(
        directory,
        {
            STATE: {"master/w": torch.arange(4.0)},
            checkpoint.STATE_RECORD: json.dumps({"step": step, "world_size": 1}).encode(),
            "adapter/adapter_config.json": b"{}",
        },
    )
    return directory


def test_a_written_directory_verifies_and_reads_back(tmp_path: Path) -> None:
    directory = write_step(tmp_path, 3)
    assert checkpoint.find_problem(directory) is None
    tensors, record, rng = checkpoint.open_state(directory)
    assert torch.equal(tensors.read("master/w"), torch.arange(4.0)) and record["step"] == 3 and rng == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003"]


@pytest.mark.parametrize("name", [STATE, "training_state.json", "adapter/adapter_config.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "flipped"])
def test_every_damage_to_a_file_is_found_and_named(tmp_path: Path, name: str, damage: str) -> None:
    directory = write_step(tmp_path, 1)
    path, content = directory / name, (directory / name).read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        flipped = content[:-1] + bytes([content[-1] ^ 1])
        path.write_bytes({"empty": b"", "truncated": content[:-1], "flipped": flipped}[damage])
    problem = checkpoint.find_problem(directory)
    assert problem is not None and name in problem


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"digest": "0", "files": {}}'])
def test_a_damaged_manifest_is_found(tmp_path: Path, content: str | None) -> None:
    directory = write_step(tmp_path, 1)
    path = directory / checkpoint.MANIFEST
    path.unlink() if content is None else path.write_text(content)
    assert "manifest.json" in (checkpoint.find_problem(directory) or "")


def test_a_manifest_edited_by_hand_does_not_verify(tmp_path: Path) -> None:
    directory = write_step(tmp_path, 1)
    path = directory / checkpoint.MANIFEST
    record = json.loads(path.read_text())
    del record["files"]["training_state.json"]
    path.write_text(json.dumps(record))
    assert "was changed" in (checkpoint.find_problem(directory) or "")


def test_latest_is_the_newest_that_verifies_and_says_what_it_passes_over(tmp_path: Path) -> None:
    good, broken = write_step(tmp_path, 2), write_step(tmp_path, 4)
    (broken / "training_state.json").write_text("")
    (tmp_path / "step-00000006").mkdir()
    newest, passed_over = checkpoint.latest(tmp_path)
    assert newest == good
    assert [path.name for path, _ in passed_over] == ["step-00000006", "step-00000004"]
    assert "manifest.json is missing" in passed_over[0][1] and "training_state.json has 0 bytes" in passed_over[1][1]


def test_latest_of_nothing_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") == (None, [])


def test_a_failing_write_leaves_nothing_and_the_old_directory_alone(tmp_path: Path) -> None:
    good = write_step(tmp_path, 2)

    def fail(temporary: Path) -> None:
        (temporary / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write_directory(tmp_path / "step-00000004", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_directory(good, fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert checkpoint.find_problem(good) is None


def test_a_broken_directory_in_the_way_is_moved_aside_and_kept(tmp_path: Path) -> None:
    broken = write_step(tmp_path, 4)
    (broken / "training_state.json").write_text("evidence")
    write_step(tmp_path, 4)
    assert checkpoint.find_problem(tmp_path / "step-00000004") is None
    assert (tmp_path / "broken-1-step-00000004" / "training_state.json").read_text() == "evidence"


def test_rotation_keeps_the_newest_good_ones_and_all_broken_ones(tmp_path: Path) -> None:
    steps = [write_step(tmp_path, step) for step in (1, 2, 3, 4)]
    (steps[1] / checkpoint.MANIFEST).unlink()
    checkpoint.rotate(tmp_path, 2, steps[3])
    assert [path.name for path in checkpoint.steps_present(tmp_path)] == [path.name for path in steps[1:]]


def test_rotation_never_deletes_the_newest(tmp_path: Path) -> None:
    steps = [write_step(tmp_path, step) for step in (1, 2)]
    checkpoint.rotate(tmp_path, 1, steps[1])
    assert checkpoint.steps_present(tmp_path) == [steps[1]]


def test_what_a_killed_save_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-00000002").mkdir()
    checkpoint.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == []
