"""The published code's checkpoints, against outputs computed by that code (tests/golden/flexmdm_reference)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit import cli
from retrofit.checkpoints.loading import load_source, resolve
from retrofit.data.tiny import byte_tokenizer
from retrofit.flexmdm import Geometric, Linear, LLaDAForMaskedDiffusion
from retrofit.hub.reference import group_size, import_reference, read_published

GOLDEN = Path(__file__).parents[1] / "golden" / "flexmdm_reference"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The LLaDA that was fine-tuned: configuration and tokenizer, and other weights."""
    directory = tmp_path_factory.mktemp("base")
    config = json.loads((GOLDEN / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("lora", "time_group_size")}
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(directory)
    model = LLaDAForMaskedDiffusion(LLaDAForMaskedDiffusion.config_class.from_dict(config))
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, directory / "model.safetensors")
    return directory


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "state_dict.safetensors")


def merged_by_hand(published: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the published code's merge_and_unload leaves it."""
    kept = {name: tensor for name, tensor in published.items() if "lora_" not in name}
    for name in [name for name in kept if "base_layer" in name]:
        a, b = (published[name.replace("base_layer", f"lora_{x}.default")] for x in "AB")
        kept[name.replace(".base_layer", "").replace("base_model.model.", "")] = kept.pop(name) + b @ a
    return {name.replace("base_model.model.", ""): tensor for name, tensor in kept.items()}


def assert_golden(directory: Path) -> Any:
    model = load_source(resolve(directory))
    expected = load_file(GOLDEN / "expected.safetensors")
    worst = 0.0
    with torch.no_grad():
        for case in range(3):
            out = model(expected[f"case{case}.xt"], timesteps=expected[f"case{case}.t"])
            for ours, name in ((out.logits, "token_logits"), (out.expected_gaps, "expected_gaps")):
                theirs = expected[f"case{case}.{name}"]
                worst = max(worst, float((ours - theirs).abs().max() / theirs.abs().max()))
    assert worst < 1e-5  # 2e-4 is asked for
    return model


@pytest.mark.parametrize("form", ["lora.safetensors", "lora.bin", "merged.bin", "bare.safetensors", "shared.bin"])
def test_every_form_gives_the_published_outputs(
    form: str, published: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    tensors = published if form.startswith("lora") else merged_by_hand(published)
    if form.startswith("bare"):  # no wrappers' names at all, one copy of what blocks share
        tensors = {name.removeprefix("backbone.").removeprefix("model."): tensor for name, tensor in tensors.items()}
        tensors = {n: t for n, t in tensors.items() if "temb_mod" not in n or ".0." in n or ".8." in n}
    file = tmp_path / form
    if file.suffix == ".bin":
        torch.save({"state_dict": tensors, "step": 7} if form.startswith("shared") else tensors, file)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    import_reference(file, tmp_path / "imported", base=str(base))
    model = assert_golden(tmp_path / "imported")
    assert model.config.time_group_size == 8
    assert isinstance(model.config.schedules.insertion, Geometric) and isinstance(
        model.config.schedules.unmasking, Linear
    )
    assert (tmp_path / "imported" / "tokenizer.json").is_file()


def test_what_the_checkpoint_lacks_comes_from_the_base(
    published: dict[str, torch.Tensor], base: Path, tmp_path: Path
) -> None:
    """A directory of PEFT factors and new modules alone, on a base that has the frozen weights."""
    frozen = {
        name.removeprefix("backbone.base_model.model.").replace(".base_layer", ""): tensor
        for name, tensor in published.items()
        if name.startswith("backbone.") and "lora_" not in name and "temb_mod" not in name
    }
    home, source = shutil.copytree(base, tmp_path / "base"), tmp_path / "source"
    save_file(frozen, home / "model.safetensors")
    source.mkdir()
    trained = {name: tensor for name, tensor in published.items() if not name.startswith("backbone.")}
    trained |= {n: t for n, t in published.items() if "lora_" in n or "temb_mod" in n}
    torch.save(trained, source / "pytorch_model.bin")
    arguments = [str(source), str(tmp_path / "imported"), "--base", str(home), "--insertion-schedule", "linear"]
    assert cli.main(["import-reference", *arguments]) == 0
    model = assert_golden(tmp_path / "imported")
    assert isinstance(model.config.schedules.insertion, Linear) and model.config.base_model == home.name


def test_without_the_new_modules_it_is_a_llada(published: dict[str, torch.Tensor], base: Path, tmp_path: Path) -> None:
    backbone = {name: tensor for name, tensor in published.items() if name.startswith("backbone.")}
    torch.save({name: tensor for name, tensor in backbone.items() if "temb_mod" not in name}, tmp_path / "mdm.bin")
    said = import_reference(tmp_path / "mdm.bin", tmp_path / "imported", base=str(base), lora_alpha=16)
    model = load_source(resolve(tmp_path / "imported"))
    assert type(model).__name__ == "LLaDAForMaskedDiffusion" and "28 LoRA products merged" in said
    stem = "backbone.base_model.model.model.transformer.ff_out."
    a, b = (published[f"{stem}lora_{x}.default.weight"] for x in "AB")
    head = published[f"{stem}base_layer.weight"] + 2 * b @ a  # alpha 16, rank 8
    torch.testing.assert_close(model.model.transformer["ff_out"].weight, head, rtol=1e-6, atol=1e-7)


def test_groups_are_found_where_the_paper_s_do_not_fit(published: dict[str, torch.Tensor], tmp_path: Path) -> None:
    modulations = read_published(GOLDEN / "state_dict.safetensors").modulations
    assert group_size(modulations, 9) == 8
    three = {key: modulations[8 if key[0] in (3, 4, 5) else 0, key[1]] for key in modulations}
    assert group_size(three, 9) == 3
    assert group_size({key: stored for key, stored in three.items() if key[0] % 3 == 0}, 9) == 3
    with pytest.raises(ValueError, match=r"blocks \[0, 1, 2, 3, 4, 5, 6, 8\]: no grouping of 9 blocks fits"):
        group_size({key: stored for key, stored in three.items() if key[0] != 7}, 9)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch harmed",)


BROKEN = {
    "code": (lambda t: t | {"x": Code()}, "holds more than tensors"),
    "no tensors": (lambda t: t | {"x": 3}, "is no state dict"),
    "a list": (lambda t: list(t.values()), "is no state dict"),
    "missing": (lambda t: {n: v for n, v in t.items() if "proj2" not in n}, "2 missing tensors for FlexMDM"),
    "surplus": (lambda t: t | {"backbone.y.weight": torch.ones(1)}, "1 surplus tensors for FlexMDM.*: y.weight"),
    "half a product": (
        lambda t: {n: v for n, v in t.items() if "0.q_proj.lora_B" not in n},
        r"blocks\.0\.q_proj\.weight has lora_A and not the other factor",
    ),
    "misshapen": (lambda t: t | {"time_mlp.2.bias": torch.ones(3)}, r"time_conditioning.output.bias \[3\] for \[64\]"),
    "twice": (
        lambda t: t | {"model.transformer.ln_f.weight": torch.ones(64)}, "stands there twice, under two prefixes"
    ),
    "misfit": (
        lambda t: {n: v[:4] if "ff_out.lora_A" in n else v for n, v in t.items()},
        "factors of model.transformer.ff_out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_fit_is_refused_in_one_line(
    kind: str, published: dict[str, torch.Tensor], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change, message = BROKEN[kind]
    torch.save(change(published), tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message) as refused:
        import_reference(tmp_path / "x.bin", tmp_path / "imported", base=str(base))
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no", b"\x80\x04}", b"text"])
def test_a_file_that_is_none_is_refused(content: bytes, base: Path, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match="is no file of torch.save"):
        import_reference(tmp_path / "x.bin", tmp_path / "imported", base=str(base))


def test_the_base_has_to_be_named_and_plain(base: Path, tmp_path: Path) -> None:
    file = GOLDEN / "state_dict.safetensors"
    with pytest.raises(ValueError, match="name the LLaDA that was fine-tuned with --base"):
        import_reference(file, tmp_path / "imported")
    import_reference(file, tmp_path / "imported", base=str(base))
    with pytest.raises(ValueError, match="exists already"):
        import_reference(file, tmp_path / "imported", base=str(base))
    with pytest.raises(ValueError, match="has to be a plain LLaDA"):
        import_reference(file, tmp_path / "again", base=str(tmp_path / "imported"))
