from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.weights import TensorFiles, weight_files
from retrofit.cli import main
from retrofit.flexmdm.modeling import NEW_MODULES
from retrofit.hub.merge import merge
from retrofit.hub.whole import parse_size
from tests.hub.conftest import make
from tests.hub.merge_peak import prepare
from tests.hub.standalone import outputs, same


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = TensorFiles(weight_files(directory))
    return {name: files.read(name) for name in files.shapes}


def left_over(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir() if path.name.startswith(checkpoint.TEMPORARY)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_weight_is_the_exact_one_within_the_stated_bound(tmp_path: Path, tied: bool, dtype: str) -> None:
    """docs/hub.md states it: (r + 2) roundings of float32 in the sum's size, and one of the dtype written."""
    adapter = make(tmp_path, tied=tied)
    merge(str(adapter), tmp_path / "merged", dtype=dtype)
    found, base = tensors(tmp_path / "merged"), tensors(tmp_path / "model")
    factors = load_file(adapter / "adapter_model.safetensors")
    rounding = {"float32": 2.0**-24, "bfloat16": 2.0**-8}[dtype]
    merged = 0
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        exact, size = weight.double(), weight.double().abs()
        if f"{key}.lora_A.weight" in factors:
            a, b = (factors[f"{key}.lora_{which}.weight"].double() for which in "AB")
            exact, size, merged = exact + 2 * b @ a, size + 2 * b.abs() @ a.abs(), merged + 1
        bound = (4 + 2) * 2.0**-24 * size + rounding * exact.abs()
        assert ((found[name].double() - exact).abs() <= bound).all(), name
    assert merged == (4 if tied else 5)
    assert {name for name in found if name.split(".")[0] not in NEW_MODULES} == base.keys()
    assert {str(tensor.dtype) for tensor in found.values()} == {f"torch.{dtype}"}


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_model_computes_what_the_adapted_one_does(tmp_path: Path, tied: bool) -> None:
    adapter = make(tmp_path, tied=tied)
    merge(str(adapter), tmp_path / "merged")
    expected = outputs(loading.load_model(adapter)[0])
    found = outputs(loading.load_model(tmp_path / "merged")[0])
    for name in ("logits", "expected_gaps"):
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(found["sample 0"], expected["sample 0"])


def test_one_block_of_rows_or_many_make_the_same_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, b = torch.randn(50, 8).bfloat16(), torch.randn(3, 8), torch.randn(50, 3)
    whole = adapters.merge(weight.clone(), a, b, 0.5, torch.bfloat16)
    monkeypatch.setattr(adapters, "_BLOCK", 24)
    assert torch.equal(adapters.merge(weight.clone(), a, b, 0.5, torch.bfloat16), whole)
    assert not torch.equal(whole, weight)


def test_shards_have_an_index_that_names_every_tensor_once(adapter: Path, tmp_path: Path) -> None:
    merge(str(adapter), tmp_path / "one")
    merge(str(adapter), tmp_path / "many", shard_size="20KB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert same(one, many) and len(set(index["weight_map"].values())) > 4
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)
    for file in set(index["weight_map"].values()):
        held = load_file(tmp_path / "many" / file)
        assert len(held) == 1 or sum(tensor.nbytes for tensor in held.values()) <= 20_000
    assert checkpoint.find_problem(tmp_path / "many") is None  # the manifest


def test_an_8b_head_would_fit_since_one_tensor_is_in_memory(tmp_path: Path) -> None:
    """A head of 101 MB in bfloat16, merged: its own memory, the file's pages, and a constant."""
    prepare(tmp_path)
    measured = subprocess.run(
        [sys.executable, Path(__file__).parent / "merge_peak.py", tmp_path], capture_output=True, text=True
    )
    assert measured.returncode == 0, measured.stderr[-2000:]
    record = json.loads(measured.stdout.splitlines()[-1])
    assert record["largest"] == 49152 * 1024 * 2 and record["total"] > 2 * record["largest"]
    assert record["above_imports"] < 2 * record["largest"] + 160e6


# ------------------------------------------------------------------------------------------------------------- refusals


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    return message.removeprefix("retrofit: error: ")


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for verb in ("merge", "export"):
        for name in ("folder", "file", "link"):
            assert "exists already and is not overwritten" in refused(capsys, verb, adapter, tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "folder").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_failure_on_the_way_leaves_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    from retrofit.checkpoints import weights

    write, calls = weights.write_tensors, 0

    def full(path: Path, *arguments: object, **more: object) -> str:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(28, "No space left on device", str(path))
        return write(path, *arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(weights, "write_tensors", full)
    message = refused(capsys, verb, adapter, tmp_path / "dest", "--shard-size", "20KB")
    assert message.endswith("model-00003-of-00009.safetensors: No space left on device"), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_no_room_on_the_disk_is_said_before_anything_is_written(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    assert refused(capsys, verb, adapter, tmp_path / "dest") == f"{tmp_path}: 0.0 GB are needed, and 0.0 GB are free"
    assert list(tmp_path.iterdir()) == []


def test_whole_weights_need_no_merge(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "merge", adapter.parent / "model", tmp_path / "dest")
    assert message == f"{adapter.parent / 'model'}: holds whole weights already, nothing is to be merged; " + (
        "see `retrofit export`"
    )


def test_an_adapter_that_does_not_apply_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make(tmp_path)
    file = adapter / "adapter_model.safetensors"
    good = load_file(file)
    key = "base_model.model.model.transformer.blocks.0.q_proj.lora_B.weight"
    for change in ({"x." + key: good[key]}, {}):
        save_file({name: tensor for name, tensor in good.items() if name != key} | change, file)
        for verb in ("merge", "export"):
            assert "1 missing keys (base_model" in refused(capsys, verb, adapter, tmp_path / "dest")
    assert not (tmp_path / "dest").exists() and left_over(tmp_path) == []


def test_another_base_than_the_run_recorded_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make(tmp_path / "here")
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "final" / "adapter")
    record = run / "checkpoints" / "step-00000002" / checkpoint.STATE_RECORD
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"base_digest": loading.resolve(tmp_path / "here" / "model").digest()}))
    assert main(["merge", str(run), str(tmp_path / "good")]) == 0
    model = tmp_path / "here" / "model" / "model.safetensors"
    changed = load_file(model)
    changed["model.transformer.ln_f.weight"] += 1e-3
    save_file(changed, model, metadata={"format": "pt"})
    message = refused(capsys, "merge", run, tmp_path / "bad")
    assert re.search(r"model: is not what .*final was trained on \(its digest is sha256:.* recorded sha256:", message)
    assert not (tmp_path / "bad").exists()


def test_another_revision_of_the_base_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = loading.base_of(loading.resolve(adapter))
    for revision, good in (("c0ffee", True), ("bad", False)):
        source = replace(base, name="some/llada", revision=revision)
        monkeypatch.setattr(loading, "base_of", lambda _, source=source: source)
        if good:
            merge(str(adapter), tmp_path / "good")
        else:
            message = refused(capsys, "merge", adapter, tmp_path / "bad")
            assert "has the base some/llada at revision bad, config.json at c0ffee" in message


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("1.5 gb", 15 * 10**8), ("2GiB", 2 << 30), ("20kb", 20_000)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "GB", "-1GB", "0GB", "5 TB", "1e3MB", "1.2.3GB", "5GBGB", ""])
def test_other_sizes_are_refused(text: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "merge", adapter, tmp_path / "dest", f"--shard-size={text}")
    assert message == f"--shard-size {text}: expected a size such as 5GB or 500MB"
