"""What `retrofit check` says of folders that load and of folders that do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from retrofit.checkpoints import tensor_file
from retrofit.checkpoints.check import check
from retrofit.checkpoints.loading import load_model
from retrofit.checkpoints.weights import TensorFiles


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy / "model", tmp_path / "model"))


def test_a_folder_that_loads(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any) -> None:
        raise AssertionError("weights are read")

    with monkeypatch.context() as patch:
        patch.setattr(TensorFiles, "read", read)
        check(folder)
    lines = capsys.readouterr().out.splitlines()
    count = sum(parameter.numel() for parameter in load_model(folder)[0].parameters())
    assert lines[0] == f"loads     {folder}: LLaDA, {count:,} parameters"
    assert "float32" in lines[1] and lines[2] == "tokenizer 262 tokens, 264 rows of embedding"
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    check(folder)
    assert "tokenizer none" in capsys.readouterr().out


def set_field(name: str, value: Any, file: str = "config.json") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {name: value}))

    return change


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "written")
        (folder / "written").replace(folder / "model.safetensors")

    return rewrite


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-1])


def overlap(folder: Path) -> None:
    """Two tensors whose bytes overlap."""
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = next(name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][0])
    header[name]["data_offsets"] = [offset - 4 for offset in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    text += b" " * (length - len(text)) if len(text) < length else b""
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def huge(folder: Path) -> None:
    """A header that claims to be longer than any memory."""
    (folder / "model.safetensors").write_bytes((1 << 60).to_bytes(8, "little") + b"{}")


NAME = "model.transformer.ln_f.weight"
BROKEN = {
    "a field out of range": (set_field("n_heads", 3), r"`d_model` 32 is no even multiple of `n_heads` 3"),
    "an unknown field": (set_field("n_layer", 3), r"field `n_layer` is not known .* `n_layers`"),
    "a mask id beyond the embedding": (set_field("mask_token_id", 264), r"`mask_token_id` 264 is not a row"),
    "a tokenizer of other ids": (set_field("eos_token_id", 9), "eos_token_id is 257 in tokenizer_config.json and 9"),
    "a missing tensor": (change_tensors(lambda t: t.pop(NAME)), f"1 missing tensors .*: {NAME}"),
    "a surplus tensor": (change_tensors(lambda t: t.update(more=t[NAME].clone())), "1 surplus tensors .*: more"),
    "a misshapen tensor": (
        change_tensors(lambda t: t.update({NAME: t[NAME][:3].clone()})), rf"{NAME} \[3\] for \[32\]",
    ),
    "a file cut short": (cut, r"model.safetensors: not a readable safetensors file"),
    "tensors that overlap": (overlap, r"model.safetensors: not a readable safetensors file"),
    "a header of any length": (huge, r"model.safetensors: not a readable safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_does_not_load_is_refused_in_one_line(kind: str, folder: Path) -> None:
    change, message = BROKEN[kind]
    change(folder)
    with pytest.raises(ValueError, match=message) as refused:
        check(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("shard", ["../model/a.safetensors", "a.safetensors"])
def test_an_index_that_leaves_the_folder_or_names_what_is_not_there_is_refused(shard: str, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    with pytest.raises(ValueError, match="leaves the directory|is missing, though the index names it"):
        check(folder)


def test_our_own_files_are_what_safetensors_reads(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensor_file.write_tensors(folder / "written", tensors)
    (folder / "written").replace(folder / "model.safetensors")  # the old file's bytes are mapped
    check(folder)
