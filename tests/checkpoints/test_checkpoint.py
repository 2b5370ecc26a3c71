from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retrofit.checkpoints import checkpoint
from tests.saves import save_now

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


FILES = [STATE, "training_state.json", "adapter/adapter_config.json", checkpoint.MANIFEST]


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "last byte missing": lambda content: content[:-1],
    "one byte too many": lambda content: content + b"\n",
    "first byte flipped": lambda content: flipped(content, 0),
    "middle byte flipped": lambda content: flipped(content, len(content) // 2),
    "last byte flipped": lambda content: flipped(content, len(content) - 1),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_a_file_is_found_and_named_and_the_previous_checkpoint_taken(
    tmp_path: Path, name: str, damage: str
) -> None:
    previous, directory = write_step(tmp_path, 1), write_step(tmp_path, 2)
    assert {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()} == set(FILES)
    path = directory / name
    damaged = DAMAGES[damage](path.read_bytes())
    path.unlink() if damaged is None else path.write_bytes(damaged)
    newest, passed_over = checkpoint.latest(tmp_path)
    assert newest == previous
    assert [(broken, name in reason) for broken, reason in passed_over] == [(directory, True)]


def test_a_change_of_any_byte_of_a_manifest_is_found(tmp_path: Path) -> None:
    """White space too: the lines' ends and the indent can be changed into other white space, which JSON reads alike."""
    directory = write_step(tmp_path, 1)
    path = directory / checkpoint.MANIFEST
    content = path.read_bytes()
    for position, byte in enumerate(content):
        for other in {byte ^ 1, byte ^ 0x80, *b" \t\r\n"} - {byte}:
            path.write_bytes(content[:position] + bytes([other]) + content[position + 1 :])
            with pytest.raises(ValueError, match="manifest.json"):
                checkpoint.read_manifest(directory)


@pytest.mark.parametrize("content", ["[]", '{"digest": "0", "files": {}}', '{"digest": "0", "files": {"a": 3}}'])
def test_other_json_is_no_manifest(tmp_path: Path, content: str) -> None:
    directory = write_step(tmp_path, 1)
    (directory / checkpoint.MANIFEST).write_text(content)
    assert "manifest.json" in (checkpoint.find_problem(directory) or "")


def test_a_manifest_of_another_format_says_so(tmp_path: Path) -> None:
    directory = write_step(tmp_path, 1)
    path = directory / checkpoint.MANIFEST
    record = json.loads(path.read_text()) | {"format_version": 1}
    record["digest"] = checkpoint.digest_of(record)
    path.write_text(json.dumps(record, indent=1) + "\n")
    assert checkpoint.find_problem(directory) == ("manifest.json has format 1; this version of retrofit reads format 2")


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


def test_what_was_moved_aside_stands_again_if_the_rename_fails(tmp_path: Path) -> None:
    good = write_step(tmp_path, 4)
    temporary = tmp_path / ".writing-step-00000004"
    shutil.copytree(good, temporary)
    entries = checkpoint.read_manifest(good)["files"]
    with pytest.raises(OSError, match="No such file"):
        checkpoint.commit(temporary, good, entries, before_rename=lambda: shutil.rmtree(temporary))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    assert checkpoint.find_problem(good) is None


def test_a_file_cut_short_before_the_rename_is_found_after_it(tmp_path: Path) -> None:
    good = write_step(tmp_path, 2)
    temporary = tmp_path / ".writing-step-00000004"
    shutil.copytree(good, temporary)
    entries = checkpoint.read_manifest(good)["files"]
    with pytest.raises(OSError, match="does not verify after writing: training_state.json has 0 bytes"):
        checkpoint.commit(
            temporary, tmp_path / "step-00000004", entries, lambda: os.truncate(temporary / "training_state.json", 0)
        )
    assert checkpoint.latest(tmp_path)[0] == good


def test_a_reader_that_comes_too_late_is_told_that_the_checkpoint_was_deleted(tmp_path: Path) -> None:
    """It has opened the manifest while the run held it for deletion."""
    steps = [write_step(tmp_path, step) for step in (1, 2)]
    problems: list[str] = []

    def read() -> None:
        try:
            with checkpoint.reading(steps[0]):
                problems.append("it can be read")
        except ValueError as error:
            problems.append(str(error))

    reader = threading.Thread(target=read)

    def begin_to_read(_: Path) -> None:
        reader.start()
        reader.join(0.3)
        assert reader.is_alive() and problems == []

    checkpoint.rotate(tmp_path, 1, steps[1], before=begin_to_read)
    reader.join(10)
    assert len(problems) == 1 and "has just deleted it" in problems[0]


def test_a_deletion_cut_short_is_no_checkpoint_and_is_finished_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [write_step(tmp_path, step) for step in (1, 2)]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors: None)
        checkpoint.rotate(tmp_path, 1, steps[1])
    assert checkpoint.steps_present(tmp_path) == [steps[1]] and len(list(tmp_path.iterdir())) == 2
    checkpoint.remove_temporaries(tmp_path)
    assert list(tmp_path.iterdir()) == [steps[1]]


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
