"""What a push may hold: whatever is in the files, the answer is a list or an error that says which file."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retrofit.hub.file_list import list_files

NAMES = ("config.json", "README.md", "model.safetensors", "model.safetensors.index.json", "modeling.py", "a.png")
FIELDS = st.sampled_from(["weight_map", "data_offsets", "__metadata__", "base_model", "license", "_name_or_path", "w"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("/home/me"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | FIELDS, inner, max_size=4),
    max_leaves=8,
)
JSON = VALUES.map(lambda value: json.dumps(value).encode())
CONTENT = st.one_of(
    st.binary(max_size=64),
    st.sampled_from(
        [b"PK\x03\x04", b"\x80\x04", b"\x89PNG\r\n\x1a\n", b"---\n", b"---\na: &a [*a]\n---\n", b"[" * 10**5]
    ),
    JSON,
    JSON.map(lambda content: len(content).to_bytes(8, "little") + content),
    VALUES.map(lambda value: f"---\nlicense: {value}\nbase_model: {value}\n---\n".encode("utf-8", "ignore")),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    return tmp_path


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(name=st.sampled_from(NAMES), content=CONTENT)
def test_any_content_gives_a_list_or_errors_that_name_the_file(
    name: str, content: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (folder / name).write_bytes(content)
    try:
        listed = list_files(folder)
    except ValueError as error:
        assert all(line.startswith(str(folder)) for line in str(error).split("\n")), error
    else:
        assert {file.name for file in listed.files} == {"config.json", "model.safetensors", name}


def test_digests_are_those_of_sha256sum_and_git(folder: Path) -> None:
    (folder / "README.md").write_text("# A model\n" * 1000)
    for file in list_files(folder).files:
        assert file.sha256 == hashlib.sha256(file.path.read_bytes()).hexdigest()
        told = subprocess.run(["git", "hash-object", "--no-filters", file.path], capture_output=True, text=True)
        assert file.blob_id == told.stdout.strip()
        assert file.size == file.path.stat().st_size


def test_the_names_are_a_list_that_the_house_itself_fills(folder: Path) -> None:
    for name in ("modeling.py", "sampling.py", "llada.py", "generation_config.json", "tokenizer.json", "LICENSE"):
        (folder / name).write_text("{}")
    (folder / "img").mkdir()
    (folder / "img" / "loss.png").write_bytes(b"\x89PNG\r\n\x1a\n rest")
    assert len(list_files(folder).files) == 9


@pytest.mark.parametrize(
    "text",
    ["hf_model", "hf_transfer_is_one", "sk-learn", "task-0123456789abcdef0123", "AKIA", "/root", "a/home", "0" * 40],
)  # fmt: skip
def test_ordinary_words_are_no_secrets(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(f"# {text}\n")
    assert len(list_files(folder).files) == 3


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
def test_pieces_of_paths_in_a_vocabulary_are_nobodys(folder: Path, name: str) -> None:
    (folder / name).write_text(json.dumps({"/home/me": 1, "/Users/x": 2}))
    assert len(list_files(folder).files) == 3


def test_reading_tells_how_far_it_is(folder: Path) -> None:
    read: list[int] = []
    listed = list_files(folder, on_bytes=read.append)
    assert sum(read) == sum(file.size for file in listed.files)


def test_what_init_writes_can_be_listed(tmp_path: Path) -> None:
    from retrofit.data.tiny import init

    init(tmp_path / "model", layers=1, d_model=16, heads=2, mlp_hidden=16, max_sequence_length=64)
    names = {file.name for file in list_files(tmp_path / "model").files}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
