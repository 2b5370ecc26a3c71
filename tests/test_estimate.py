"""`retrofit estimate`: a table for a rank, from configurations alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.cli import main
from retrofit.recipe import Recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, toy: Path, tmp_path: Path) -> Path:
    """A recipe of a model of which there is config.json alone."""
    (tmp_path / "model").mkdir()
    shutil.copyfile(toy / "model/config.json", tmp_path / "model/config.json")
    path = tmp_path / "recipe.yaml"
    make_recipe(tmp_path / "run", f"--model.init_from={tmp_path / 'model'}", file=path)
    path.write_text(path.read_text().replace(str(toy / "model"), str(tmp_path / "model")))
    return path


def estimate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, str]:
    """First words of each line -> the rest."""
    assert main(["estimate", *map(str, arguments)]) == 0
    lines = [line.strip().partition("  ") for line in capsys.readouterr().out.splitlines()]
    return {name: rest.strip() for name, _, rest in lines}


def test_the_parts_add_up_and_the_largest_budget_fits(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--memory", 0.004, "--training.documents_per_step=64")
    said = estimate(capsys, recipe, *options, "--training.max_tokens_per_device=auto")
    assert said["model"].startswith("FlexMDMForMaskedDiffusion") and "39,905 of 39,905 parameters" in said["model"]
    assert said["engine"] == "ddp, 1 ranks, 1 on a machine"
    assert said["memory"] == "3.60 MB may be filled by a rank: 0.004 GB a device, 10% of it in reserve"
    assert said["documents"] == "of 29 rows at most"
    parts = [float(said[name].removesuffix(" MB")) for name in (
        "frozen weights", "trained weights", "gradients", "Adam's moments", "average (ema_decay)", "gathered, buckets",
        "activations", "logits",
    )]  # fmt: skip
    assert parts[:4] == [0, 0.16, 0.16, 0.32]
    total, _, verdict = said["total"].partition(" MB")
    assert float(total) == pytest.approx(sum(parts), abs=0.05) and verdict.strip() == "fits"
    largest = int(said["largest"].removeprefix("training.max_tokens_per_device: "))
    more = estimate(capsys, recipe, *options, f"--training.max_tokens_per_device={2 * largest}")
    assert "DOES NOT FIT" in more["total"] and more["largest"] == said["largest"]


def test_a_launch_file_says_what_is_split_over_how_many(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    launch = ("--launch", "launch/accelerate/fsdp2-hybrid.yaml")
    said = estimate(capsys, recipe, *launch, "--memory", 1, "--training.documents_per_step=16")
    assert said["engine"] == "fsdp2, 16 ranks, 8 on a machine"
    assert said["Adam's moments"] == "0.04 MB"  # an eighth of 0.32
    assert said["largest"] == "training.max_tokens_per_device: 29; a step has no more for a rank"
    said = estimate(capsys, recipe, "--launch", "launch/accelerate/zero1.yaml", "--num-processes", 4, "--memory", 1)
    assert said["engine"] == "zero1, 4 ranks, 4 on a machine" and "DOES NOT FIT" in said["total"]  # 1.6 GB of buckets
    assert said["largest"] == "none: the longest document alone does not fit"


def test_without_the_data_documents_fill_the_window(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = estimate(capsys, recipe, "--data.path=/nowhere", "--memory", 1)
    assert said["documents"] == "of 33 rows at most; there are no data at /nowhere, so they are to fill the window"


def test_a_model_that_is_not_here_is_refused_with_the_remedy(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["estimate", str(recipe), "--model.init_from=nobody/nothing"]) == 2
    said = capsys.readouterr().err
    assert "nobody/nothing has not been downloaded to this machine; its config.json alone will do" in said
    assert main(["estimate", str(recipe), f"--model.init_from={tmp_path}/absent/model"]) == 2
    assert "no such directory" in capsys.readouterr().err


def test_a_batch_that_cannot_be_is_not_estimated(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", str(recipe), "--training.max_tokens_per_device", "99999999999999999999"]) == 0
    said = capsys.readouterr().out
    largest = re.search(r"max_tokens_per_device: (\d+); a step has no more for a rank", said)
    assert largest and f"a micro-batch of {int(largest[1]):,} rows" in said


@pytest.mark.parametrize("option", ["--memory", "--num_processes"])
@pytest.mark.parametrize("value", ["0", "-3", "nan", "inf", "1e300", "x"])
def test_numbers_that_are_none_are_refused(
    option: str, value: str, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", str(recipe), f"{option}={value}"]) == 2
    assert (
        f"expected a positive {'number' if option == '--memory' else 'whole number'}, found" in capsys.readouterr().err
    )
