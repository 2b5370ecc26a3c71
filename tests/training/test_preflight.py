"""Before a run starts: the size of its checkpoints, against files that were written, and the space for them."""

import os
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest

from retrofit.data.store import TokenStore
from retrofit.training import preflight, start
from retrofit.training.loop import train
from retrofit.training.preflight import check_space, checkpoint_bytes

LORA = ("--lora.r=3", "--lora.lora_alpha=6", "--lora.target_modules=[q_proj, v_proj, model.transformer.ff_out]")
EMA = "--training.ema_decay=0.9"
BFLOAT16 = ("--model.dtype=bfloat16", "--training.bf16=true")


@pytest.mark.parametrize(
    "options", [(), (EMA,), BFLOAT16, LORA, (*LORA, EMA), (*LORA, *BFLOAT16)], ids=lambda options: " ".join(options)
)
def test_a_checkpoint_has_the_bytes_that_were_counted(make_recipe, tmp_path, options):
    recipe = make_recipe(tmp_path / "run", "--training.max_steps=1", *options)
    begin = start.from_recipe(recipe, TokenStore.open(recipe.data.path))
    sizes = checkpoint_bytes(begin, average=recipe.training.ema_decay is not None)
    train(recipe)

    def written(directory, pattern):
        return sum(path.stat().st_size for path in directory.rglob(pattern))

    directory = tmp_path / "run/checkpoints/step-00000001"
    tensors = written(directory, "training_state*.safetensors") + written(directory, "*model*.safetensors")
    small = 2 * (preflight._SMALL_FILES + sum(map(len, begin.tokenizer_files.values())))
    assert sizes.checkpoint - small <= tensors  # the small files are counted generously, the tensors exactly
    assert written(directory, "*") <= sizes.checkpoint <= 1.01 * written(directory, "*") + small
    assert written(tmp_path / "run/final", "*") <= sizes.weights <= 1.01 * written(tmp_path / "run/final", "*") + small


@pytest.fixture
def begin(make_recipe, tmp_path):
    """The start of a recipe of ten saves, and the recipe."""

    def begin(*options):
        recipe = make_recipe(tmp_path / "run", "--training.max_steps=20", *options)
        return start.from_recipe(recipe, TokenStore.open(recipe.data.path)), recipe

    return begin


@pytest.fixture
def free(monkeypatch):
    """Sets the free space of every disk, in bytes."""

    def free(size):
        monkeypatch.setattr(preflight.os, "statvfs", lambda path: SimpleNamespace(f_bavail=int(size), f_frsize=1))

    return free


def checkpoints_wanted(warning):
    return int(re.search(r"for (\d+) more checkpoints", warning).group(1))


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ((), 10),
        (("--training.save_steps=3",), 7),  # 3, 6, 9, 12, 15, 18 and 20
        (("--training.save_total_limit=2",), 3),
        (("--training.save_total_limit=2", "--training.save_every_keep=10"), 5),
        (("--training.save_total_limit=20",), 10),
    ],
)
def test_a_disk_is_warned_of_from_the_first_byte_that_is_missing(begin, free, options, most):
    started, recipe = begin(*options)
    sizes = checkpoint_bytes(started, average=False)
    needed = most * sizes.checkpoint + sizes.weights
    free(needed)
    assert check_space(started, recipe) is None
    free(needed - 1)
    assert checkpoints_wanted(check_space(started, recipe)) == most


def test_a_disk_without_room_for_one_checkpoint_and_the_final_weights_is_refused(begin, free):
    started, recipe = begin()
    sizes = checkpoint_bytes(started, average=False)
    free(sizes.checkpoint + sizes.weights)
    assert check_space(started, recipe) is not None
    free(sizes.checkpoint + sizes.weights - 1)
    with pytest.raises(ValueError, match=r"training.output_dir: .* free; one checkpoint takes"):
        check_space(started, recipe)


def test_what_a_run_holds_already_is_not_counted_again(begin, free, tmp_path):
    started, recipe = begin("--training.save_total_limit=2")
    sizes = checkpoint_bytes(started, average=False)
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/step-{step:08d}").mkdir(parents=True)
    free(sizes.checkpoint + sizes.weights)
    assert check_space(started, recipe) is None
    (tmp_path / "run/final").mkdir()
    free(sizes.checkpoint)
    assert check_space(started, recipe) is None


def test_training_refuses_a_full_disk_before_it_writes_anything(make_recipe, free, tmp_path):
    recipe = make_recipe(tmp_path / "run")
    free(1000)
    with pytest.raises(ValueError, match=r"training.output_dir: .* free; one checkpoint takes"):
        train(recipe)
    assert not (tmp_path / "run/recipe.yaml").exists() and not (tmp_path / "run/checkpoints").exists()


def test_training_goes_on_with_a_warning_on_a_disk_for_one_checkpoint_and_a_half(begin, free, tmp_path, capfd):
    started, recipe = begin()
    recipe = replace(recipe, training=replace(recipe.training, max_steps=4))
    free(1.5 * checkpoint_bytes(started, average=False).checkpoint)
    train(recipe)
    assert capfd.readouterr().err.count("saves will fail once it is full") == 1
    assert os.path.isdir(tmp_path / "run/final")
