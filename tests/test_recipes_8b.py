"""The 8B recipes, built on the meta device: parsed, counted, and sized, without a byte of weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.checkpoints import adapters, loading
from retrofit.checkpoints.loading import Source
from retrofit.checkpoints.weights import Weights
from retrofit.cli import main
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.modeling import NEW_MODULES
from retrofit.recipe import Recipe, load_recipe
from retrofit.sections import FLEXMDM_FIELDS
from retrofit.training.estimate import Layout, standing
from retrofit.training.preflight import checkpoint_bytes
from retrofit.training.start import Start, _finish, _settings

FOLDER = Path(__file__).parents[1] / "recipes" / "llada-8b"
LLADA = 8_015_581_184


def begin(recipe: Recipe) -> Start:
    """What `start.from_recipe` makes of the recipe, but for the weights' whereabouts."""
    given = {name: getattr(recipe.model, name) for name in FLEXMDM_FIELDS if getattr(recipe.model, name) is not None}
    frozen = torch.bfloat16 if recipe.lora is not None else torch.float32
    model: Any = loading.on_meta(FlexMDMConfig(**given), frozen)
    settings = _settings(recipe) if recipe.lora is not None else None
    if settings is not None:
        adapters.inject(model, settings)
    _finish(model, recipe)
    readers = {name: torch.empty for name, _ in model.named_parameters()}
    source = Source("full", Path("absent"), recipe.model.init_from)
    return Start(model, Weights(model, readers), torch.bfloat16, settings, ("absent", None), {}, source)  # type: ignore[arg-type]


def test_the_lora_recipe_trains_what_the_paper_trains() -> None:
    """d = 4096, V = 126,464, r = 128, hidden 16,384, four groups of eight blocks, time embedding of width e = d.

    Factors: 32 blocks x 3 maps x 128 (d + d) = 100,663,296; head: 128 (d + V) = 16,711,680.
    New modules: e 16,384 + 16,384 + 16,384 d + d; 4 (d 2d + 2d); flags 2 d; head norm 2 d, d d + d, d + 1.
    """
    recipe = load_recipe(FOLDER / "transfer.yaml")
    start = begin(recipe)
    d, e, hidden = 4096, start.model.config.time_embedding_size, 16_384
    new = (e * hidden + hidden + hidden * d + d) + 4 * (d * 2 * d + 2 * d) + 2 * d + 2 * d + (d * d + d) + (d + 1)
    trained = sum(start.weights.shapes[name].numel() for name in start.trainable)
    assert trained == 100_663_296 + 16_711_680 + new == 402_665_473
    assert sum(start.weights.shapes[name].numel() for name in start.trainable if name.split(".")[0] in NEW_MODULES) == (
        new
    )
    assert all(parameter.is_meta for parameter in start.model.parameters())
    # Master and two moments, and the adapter beside them: 16 bytes a trained parameter.
    sizes = checkpoint_bytes(start, average=False)
    assert sizes.checkpoint == pytest.approx(16 * trained, rel=1e-3) and 6.4e9 < sizes.checkpoint < 6.5e9


def test_the_full_recipe_trains_all_weights_and_its_checkpoints_are_116_gigabytes() -> None:
    start = begin(load_recipe(FOLDER / "transfer-full.yaml"))
    trained = sum(start.weights.shapes[name].numel() for name in start.trainable)
    assert trained == LLADA + 285_290_497
    sizes = checkpoint_bytes(start, average=False)
    assert sizes.state == pytest.approx(12 * trained, rel=1e-4) and sizes.weights == pytest.approx(
        2 * trained, rel=1e-4
    )
    assert 116e9 < sizes.checkpoint < 116.5e9
    shares = start.shares(16)
    loads = [0] * 16
    for name, rank in shares.items():
        loads[rank] += start.weights.sizes[name]
    assert max(loads) / (sum(loads) / 16) < 1.05


@pytest.mark.parametrize("name", ["transfer", "transfer-full"])
def test_the_launch_files_fit_the_recipes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.training.launch_file import LaunchFile

    monkeypatch.chdir(FOLDER.parents[1])
    recipe = load_recipe(FOLDER / f"{name}.yaml")
    for engine in ("ddp",) if name == "transfer" else ("zero1", "zero2", "zero3", "fsdp2", "fsdp2-hybrid"):
        LaunchFile.read(Path(f"launch/accelerate/{engine}.yaml"), processes=16).check(recipe)


def test_estimate_needs_config_json_alone_and_the_lora_recipe_fits(tmp_path: Path, capsys: Any) -> None:
    """8,015,581,184 weights of 2 bytes; 402,665,473 of 4, and two moments."""
    LLaDAConfig().save_pretrained(tmp_path)
    options = ["--launch", "launch/accelerate/ddp.yaml", "--num_processes=16", "--memory=80"]
    changes = [f"--model.init_from={tmp_path}", "--training.max_tokens_per_device=auto"]
    assert main(["estimate", str(FOLDER / "transfer.yaml"), *options, *changes]) == 0
    said = {line.strip().partition("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert "402,665,473 of 8,418,246,657" in said["model"] and said["largest"].endswith(
        "max_tokens_per_device: 8200; a step has no more for a rank"
    )
    for part, expected in {"frozen weights": "16.03", "trained weights": "1.61", "Adam's moments": "3.22"}.items():
        assert f" {expected} GB" in said[part], part
    assert said["total"].endswith("GB  fits")


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_the_full_recipe_leaves_half_of_each_gpu_to_its_micro_batches(engine: str) -> None:
    """8,300,871,681 weights of 4 bytes over 16 ranks, gradients and two moments; below 10 GB gathered."""
    recipe = load_recipe(FOLDER / "transfer-full.yaml")
    start, zero = begin(recipe), json.loads((FOLDER.parents[1] / "launch/deepspeed/zero3.json").read_text())
    layout = Layout(engine, 16, 16, 8, zero["zero_optimization"])
    parts = standing(start, layout, bf16=True, average=False)
    assert parts.moments == pytest.approx(2 * 4 * 8_300_871_681 / 16, rel=1e-3) and parts.frozen == 0
    assert parts.gathered < 10e9 and parts.total < 20e9


@pytest.fixture(scope="module")
def llada_8b(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaDA-8B in the released layout but for its token ids, its 16 GB of weights a hole in the file."""
    directory = tmp_path_factory.mktemp("llada-8b")
    ids = json.loads((toy / "model/config.json").read_text())
    config = LLaDAConfig(**{name: ids[name] for name in ("mask_token_id", "pad_token_id", "eos_token_id")})
    config.save_pretrained(directory)
    header, end = {}, 0
    for name, parameter in loading.on_meta(config, torch.bfloat16).named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end == 2 * LLADA
    return directory


@pytest.mark.parametrize(
    ("name", "counted", "size"),
    [
        ("transfer", "402,665,473 of 8,418,246,657", "6.44 GB"),
        ("transfer-full", "8,300,871,681 of 8,300,871,681", "116"),
    ],
)
def test_validate_counts_the_recipes_on_files_of_that_size(
    llada_8b: Path, toy: Path, tmp_path: Path, name: str, counted: str, size: str, capsys: Any, monkeypatch: Any
) -> None:
    plenty = SimpleNamespace(f_bavail=10**15, f_frsize=1)
    monkeypatch.setattr("retrofit.training.preflight.os.statvfs", lambda path: plenty)
    recipe = str(FOLDER / f"{name}.yaml")
    places = [f"--model.init_from={llada_8b}", f"--data.path={toy / 'store'}", f"--training.output_dir={tmp_path}/run"]
    assert main(["validate", recipe, *places]) == 0
    out = capsys.readouterr().out
    assert counted in out and f"ok       checkpoints: {size}" in out and "ok       space: enough" in out
