from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoints import adapters, checkpoint
from retrofit.checkpoints.adapters import AdapterSettings
from retrofit.checkpoints.loading import load_model, resolve
from retrofit.data.tiny import init
from retrofit.flexmdm import FlexMDMForMaskedDiffusion, LLaDAForMaskedDiffusion
from tests.saves import save_adapter


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` (a plain LLaDA), `sharded` (the same in two shards), `adapter` (a bare PEFT directory of a FlexMDM)."""
    root = tmp_path_factory.mktemp("loading")
    init(root / "model", layers=1, d_model=16, heads=2, mlp_hidden=24, max_sequence_length=32)
    tensors = load_file(root / "model" / "model.safetensors")
    shutil.copytree(root / "model", root / "sharded")
    (root / "sharded" / "model.safetensors").unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    keys = sorted(tensors)
    weight_map = {key: names[i % 2] for i, key in enumerate(keys)}
    for name in names:
        save_file({k: tensors[k] for k in keys if weight_map[k] == name}, root / "sharded" / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))

    torch.manual_seed(0)
    model = FlexMDMForMaskedDiffusion.from_pretrained(root / "model")
    settings = AdapterSettings(2, 4.0, 0.0, ("q_proj",))
    adapters.inject(model, settings)
    weights = {name: torch.randn_like(model.get_parameter(name)) for name in adapters.adapter_names(model)}
    save_adapter(root / "adapter", weights, settings, base_model=str(root / "model"), base_revision=None)
    model.config.save_pretrained(root / "adapter")
    return root


def make_run(root: Path, path: Path) -> Path:
    """A run with checkpoints 2 and 4 of different weights, and no final/."""
    tensors = load_file(root / "model" / "model.safetensors")
    for step in (2, 4):

        def write(directory: Path, step: int = step) -> None:
            shutil.copytree(root / "model", directory, dirs_exist_ok=True)
            save_file({k: t + step for k, t in tensors.items()}, directory / "model.safetensors", {"format": "pt"})

        checkpoint.write_directory(path / "checkpoints" / checkpoint.step_name(step), write)
    return path


def first_weight(model: torch.nn.Module) -> torch.Tensor:
    return next(model.parameters()).detach()


def test_the_class_follows_the_model_type_and_the_tokenizer_comes_along(root: Path) -> None:
    model, tokenizer = load_model(root / "model")
    assert type(model) is LLaDAForMaskedDiffusion and not model.training
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]
    model, tokenizer = load_model(root / "adapter")
    assert type(model) is FlexMDMForMaskedDiffusion
    assert tokenizer.encode("ab", add_special_tokens=False) == [97, 98]  # the base's


def test_weights_lie_in_aligned_memory_of_their_own(root: Path) -> None:
    for place in ("model", "sharded", "adapter"):
        model, _ = load_model(root / place)
        assert {parameter.data_ptr() % 64 for parameter in model.parameters()} == {0}


def test_shards_load_as_one_file_does_and_a_missing_one_is_named(root: Path, tmp_path: Path) -> None:
    whole, sharded = load_model(root / "model")[0].state_dict(), load_model(root / "sharded")[0].state_dict()
    assert all(torch.equal(whole[key], sharded[key]) for key in whole)
    broken = shutil.copytree(root / "sharded", tmp_path / "broken")
    (broken / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing.*incomplete download"):
        load_model(broken)


def test_a_cut_file_is_refused(root: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(root / "model", tmp_path / "broken")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
        load_model(broken)


def test_a_run_means_its_final_weights_else_the_newest_good_checkpoint(root: Path, tmp_path: Path) -> None:
    run = make_run(root, tmp_path / "run")
    base = first_weight(load_model(root / "model")[0])
    assert torch.equal(first_weight(load_model(run)[0]), base + 4)
    (run / "checkpoints" / "step-00000004" / "tokenizer.json").unlink()
    assert torch.equal(first_weight(load_model(run)[0]), base + 2)
    assert torch.equal(first_weight(load_model(run / "checkpoints" / "step-00000002")[0]), base + 2)
    shutil.copytree(root / "model", run / "final")
    assert torch.equal(first_weight(load_model(run)[0]), base)


def test_a_run_without_a_good_checkpoint_is_refused_with_the_reasons(root: Path, tmp_path: Path) -> None:
    run = make_run(root, tmp_path / "run")
    for step in (2, 4):
        (run / "checkpoints" / checkpoint.step_name(step) / "config.json").unlink()
    with pytest.raises(
        ValueError, match="no checkpoint that verifies .step-00000004: config.json is missing; step-0000"
    ):
        load_model(run)


def test_a_flipped_byte_in_a_checkpoint_is_noticed(root: Path, tmp_path: Path) -> None:
    directory = make_run(root, tmp_path / "run") / "checkpoints" / "step-00000002"
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="model.safetensors differs from its SHA-256"):
        load_model(directory)


def test_an_adapter_that_does_not_fit_is_refused(root: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(root / "adapter", tmp_path / "broken")
    tensors = load_file(broken / adapters.WEIGHTS_FILE)
    save_file({"other." + key: tensor for key, tensor in tensors.items()}, broken / adapters.WEIGHTS_FILE)
    with pytest.raises(ValueError, match=rf"{len(tensors)} unmatched keys \(other.*{len(tensors)} missing keys"):
        load_model(broken)


def test_an_adapter_whose_base_is_gone_says_where_it_was(root: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(root / "adapter", tmp_path / "lost")
    path = lost / adapters.CONFIG_FILE
    path.write_text(path.read_text().replace(str(root / "model"), str(tmp_path / "moved")))
    with pytest.raises(ValueError, match="moved: no such directory; set base_model_name_or_path"):
        load_model(lost)


def test_a_bare_adapter_without_its_config_is_refused_for_want_of_schedules(root: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(root / "adapter", tmp_path / "bare")
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing, and with it the schedules"):
        load_model(bare)


@pytest.mark.parametrize("content", ["{", '{"model_type": "llama"}', "[]"])
def test_another_config_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="config.json: (not a model configuration|model_type is 'llama')"):
        load_model(tmp_path)


def test_what_is_neither_a_directory_nor_to_be_had_from_the_hub_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match="someone/absent-model: no such directory here, and not to be had from the Hub"
    ):
        resolve("someone/absent-model")
    with pytest.raises(ValueError, match="no such directory$"):
        resolve("/absent/for/sure")
    with pytest.raises(ValueError, match="is neither a run, a checkpoint, an adapter nor a model directory"):
        resolve(tmp_path)
    with pytest.raises(ValueError, match="the revision 'main' has no meaning"):
        resolve(tmp_path, "main")
