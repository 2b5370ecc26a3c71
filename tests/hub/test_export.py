"""Exported folders. `standalone.py` loads them in a process without retrofit; `compat.py` does in other versions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from retrofit.checkpoints import loading
from retrofit.checkpoints.weights import TensorFiles, weight_files
from retrofit.cli import main
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig
from retrofit.flexmdm.modeling import NEW_MODULES
from retrofit.hub.export import export
from retrofit.hub.merge import merge
from tests.hub.conftest import make
from tests.hub.standalone import outputs, same

ROOM = Path(__file__).parents[2] / "retrofit" / "flexmdm"
GOLDEN = Path(__file__).parents[1] / "golden"
CHECKS = (
    "tokenizer", "config", "AutoModelForMaskedLM", "hub_id", "device_map", "low_cpu_mem_usage", "meta",
    "gradient_checkpointing", "saved_again", "saved_twice",
)  # fmt: skip


def load_apart(folder: Path, work: Path, dtype: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(record, outputs) of standalone.py in a process that sees neither this repository nor retrofit."""
    work.mkdir()
    script = Path(__file__).parent / "standalone.py"
    ran = subprocess.run(
        [sys.executable, "-I", script, folder, work, dtype], cwd=work, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), load_file(work / "outputs.safetensors")


def test_a_flexmdm_loads_with_transformers_alone_and_gives_what_ours_does(adapter: Path, tmp_path: Path) -> None:
    """Exported in shards, from an adapter, and compared with the merged model in this package."""
    export(str(adapter), tmp_path / "my-model.v1", shard_size="20KB")
    merge(str(adapter), tmp_path / "merged")
    expected = outputs(loading.load_model(tmp_path / "merged")[0])
    record, found = load_apart(tmp_path / "my-model.v1", tmp_path / "work", "float32")
    assert same(found, expected)
    assert len(found["sample 0"]) > 3 and found["expected_gaps"].std() > 0
    assert {name: record[name] for name in CHECKS} == dict.fromkeys(CHECKS, True)
    assert record["code"] == "transformers_modules"


def test_a_base_loads_with_transformers_alone_and_is_the_flexmdms(tmp_path: Path) -> None:
    adapter = make(tmp_path, tied=True)
    export(str(adapter), tmp_path / "base", base_only=True, dtype="bfloat16")
    merge(str(adapter), tmp_path / "merged", dtype="bfloat16")
    record, found = load_apart(tmp_path / "base", tmp_path / "work", "bfloat16")
    assert {name: record[name] for name in CHECKS} == dict.fromkeys(CHECKS, True)
    assert same(found, outputs(loading.load_model(tmp_path / "base")[0]))
    whole = load_file(tmp_path / "merged" / "model.safetensors")
    backbone = {name: tensor for name, tensor in whole.items() if name.split(".")[0] not in NEW_MODULES}
    assert same(load_file(tmp_path / "base" / "model.safetensors"), backbone)


@pytest.mark.parametrize("name", ["llada_tiny", "illada_tiny"])
def test_the_base_of_an_untrained_flexmdm_is_the_released_checkpoint_again(tmp_path: Path, name: str) -> None:
    """Names, shapes, values and config fields, against files that LLaDA's published code made and reads."""
    model = FlexMDMForMaskedDiffusion.from_pretrained(GOLDEN / name, dtype=torch.float32)
    model.save_pretrained(tmp_path / "flexmdm")
    export(str(tmp_path / "flexmdm"), tmp_path / "base", base_only=True)
    released = load_file(GOLDEN / name / "model.safetensors")
    assert same(load_file(tmp_path / "base" / "model.safetensors"), released)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path / "base", GOLDEN / name))
    assert ours.pop("auto_map") and ours == theirs | {"torch_dtype": "float32"}


@pytest.mark.parametrize("entry", ["modeling.py", "llada.py", "configuration.py"])
def test_an_entry_of_the_room_names_all_that_it_needs(entry: str) -> None:
    """transformers 4.57 copies the files that the entry imports itself, and no further."""
    needed = {Path(path).stem for path in get_relative_import_files(ROOM / entry)} - {Path(entry).stem}
    assert set(get_relative_imports(ROOM / entry)) - {Path(entry).stem} == needed
    assert needed


def test_the_room_asks_for_torch_and_transformers_alone() -> None:
    """By transformers' own count: it refuses to load code whose packages are not installed."""
    for path in sorted(ROOM.glob("*.py")):
        foreign = set(get_imports(path)) - set(sys.stdlib_module_names)
        assert foreign <= {"torch", "transformers"}, (path.name, foreign)


def test_the_folder_holds_what_is_needed_and_nothing_else(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "folder", shard_size="50KB")
    names = {path.name for path in (tmp_path / "folder").iterdir()}
    shards = {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    code = {"modeling.py", "llada.py", "configuration.py", "attention.py", "packing.py", "schedules.py", "noise.py"}
    small = {"config.json", "generation_config.json", "model.safetensors.index.json", "sampling.py", "README.md"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == shards | code | small | tokenizer and len(shards) > 2
    for name in code:
        assert (tmp_path / "folder" / name).read_bytes() == (ROOM / name).read_bytes()
    index = json.loads((tmp_path / "folder" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    assert index["weight_map"].keys() == TensorFiles(weight_files(tmp_path / "folder")).shapes.keys()


def test_the_config_carries_the_meaning_and_the_tokenizer_a_class_that_all_versions_know(
    adapter: Path, tmp_path: Path
) -> None:
    export(str(adapter), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["insertion_schedule"] == {"type": "power", "exponent": 1.7}
    assert (config["base_model"], config["base_revision"]) == ("some/llada", "c0ffee")
    assert (config["mask_token_id"], config["pad_token_id"], config["dtype"]) == (258, 257, "float32")
    assert config["architectures"] == ["FlexMDMForMaskedDiffusion"]
    assert str(adapter.parent) not in (tmp_path / "folder" / "config.json").read_text()
    assert json.loads((adapter.parent / "model" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "TokenizersBackend"  # what transformers 5 writes, and 4 does not know
    )
    settings = json.loads((tmp_path / "folder" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = json.loads((tmp_path / "folder" / "generation_config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (257, 257)


def test_an_export_is_a_source_again_whose_code_is_not_carried_on(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter), tmp_path / "one")
    export(str(tmp_path / "one"), tmp_path / "two")
    export(str(adapter), tmp_path / "base", base_only=True)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one.pop("README.md") == two.pop("README.md").replace(b"two", b"one") and one == two
    for name, kind in (("one", FlexMDMConfig), ("base", LLaDAConfig)):
        config = loading.model_config(loading.resolve(tmp_path / name))
        assert type(config) is kind and not hasattr(config, "auto_map")
    FlexMDMForMaskedDiffusion.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "saved")
    assert "auto_map" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert main(["generate", str(tmp_path / "one"), "--prompt", "ab", "--steps", "4"]) == 0


def test_a_plain_llada_is_exported_as_one(adapter: Path, tmp_path: Path) -> None:
    export(str(adapter.parent / "model"), tmp_path / "folder")
    released = load_file(adapter.parent / "model" / "model.safetensors")
    assert same(load_file(tmp_path / "folder" / "model.safetensors"), released)
    assert not (tmp_path / "folder" / "generation_config.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_all_weights_are_of_the_dtype_that_was_asked_for(adapter: Path, tmp_path: Path, dtype: str) -> None:
    export(str(adapter), tmp_path / "folder", dtype=dtype)
    files = TensorFiles(weight_files(tmp_path / "folder"))
    assert set(files.dtypes.values()) == {getattr(torch, dtype)}
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["dtype"] == dtype
    model, _ = loading.load_model(tmp_path / "folder")
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_prompts_may_be_plain_token_ids(adapter: Path) -> None:
    from retrofit.flexmdm.sampling import Prompt

    model, _ = loading.load_model(adapter)
    settings: dict[str, Any] = {"steps": 4, "max_length": 20}
    assert model.generate([[97, 98]], **settings) == model.generate([Prompt([97, 98])], **settings)


def test_a_tokenizer_that_does_not_fit_is_refused_and_one_that_is_missing_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(tmp_path)
    file = adapter.parent / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for number in (262, 263, 264):
        tokenizer["added_tokens"].append(dict(tokenizer["added_tokens"][0], id=number, content=f"<{number}>"))
    file.write_text(json.dumps(tokenizer))
    for verb in ("merge", "export"):
        assert main([verb, str(adapter), str(tmp_path / verb)]) == 2
        assert "token '<264>' has id 264, the model has 264 rows" in capsys.readouterr().err
        assert not (tmp_path / verb).exists()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (adapter.parent / "model" / name).unlink()
    assert main(["export", str(adapter), str(tmp_path / "folder")]) == 0
    assert "has no tokenizer, so the folder gets none" in capsys.readouterr().err
