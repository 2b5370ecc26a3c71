"""Before a run starts: the size of its checkpoints, against files that were written, and the space for them."""

import re
from collections import namedtuple

import pytest

from retrofit.data.store import TokenStore
from retrofit.training import preflight, start
from retrofit.training.loop import train
from retrofit.training.preflight import CheckpointBytes, check_space, checkpoint_bytes, checkpoints_at_once

LORA = ("--lora.r=3", "--lora.lora_alpha=6", "--lora.target_modules=[q_proj, v_proj, model.transformer.ff_out]")
EMA = "--training.ema_decay=0.9"
BFLOAT16 = ("--model.dtype=bfloat16", "--training.bf16=true")
SIZE = CheckpointBytes(state=3 * 10**9, weights=10**9)  # 4 GB, final/ 1 GB


@pytest.mark.parametrize(
    "options", [(), (EMA,), BFLOAT16, LORA, (*LORA, EMA), (*LORA, *BFLOAT16)], ids=lambda options: " ".join(options)
)
def test_a_checkpoint_has_the_bytes_that_were_counted(make_recipe, tmp_path, options):
    recipe = make_recipe(tmp_path / "run", "--training.max_steps=1", *options)
    begin = start.from_recipe(recipe, TokenStore.open(recipe.data.path))
    counted = checkpoint_bytes(begin.model, begin.adapter, begin.dtype, ema=recipe.training.ema_decay is not None)
    train(recipe)

    def written(directory, pattern):
        return sum(path.stat().st_size for path in directory.rglob(pattern))

    directory = tmp_path / "run/checkpoints/step-00000001"
    headers = 20_000  # names and offsets of some hundred tensors
    assert counted.state <= written(directory, "training_state*.safetensors") < 1.01 * counted.state + headers
    assert counted.weights <= written(directory, "*model*.safetensors") < 1.01 * counted.weights + headers
    whole, small = written(directory, "*"), 60_000  # tokenizer and JSON
    assert counted.whole <= whole < 1.01 * counted.whole + headers + small
    assert counted.weights <= written(tmp_path / "run/final", "*") < 1.01 * counted.weights + headers + small


@pytest.fixture
def training(make_recipe, tmp_path):
    """Ten saves."""

    def training(*options):
        return make_recipe(tmp_path / "run", "--training.max_steps=20", *options).training

    return training


@pytest.fixture
def free(monkeypatch):
    """Sets the free space of every disk, in bytes."""

    def free(size):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda path: usage(0, 0, size))

    return free


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
def test_the_most_checkpoints_at_a_time(training, options, most):
    assert checkpoints_at_once(training(*options)) == most


def test_a_disk_without_room_for_one_checkpoint_and_the_final_weights_is_refused(training, free, tmp_path):
    free(5 * 10**9 - 1)
    with pytest.raises(ValueError, match=r"has 5 GB free; one checkpoint of 4 GB and final/ of 1 GB do not fit"):
        check_space(tmp_path / "a" / "run", SIZE, training())


def test_a_merged_base_needs_room_too(training, free, tmp_path):
    free(8 * 10**9 - 1)
    assert check_space(tmp_path / "run", SIZE, training("--training.save_steps=20")) == []
    with pytest.raises(ValueError, match=r"and final/ of 1 GB and a merged base of 3 GB do not fit"):
        check_space(tmp_path / "run", SIZE, training("--training.save_steps=20"), base=3 * 10**9)


def test_a_disk_without_room_for_all_that_is_kept_is_warned_of(training, free, tmp_path):
    limited = training("--training.save_total_limit=2")
    free(13 * 10**9 - 1)
    (warning,) = check_space(tmp_path / "run", SIZE, limited)
    assert "3 checkpoints of 4 GB and final/ are to come (save_total_limit 2;" in warning
    free(13 * 10**9)
    assert check_space(tmp_path / "run", SIZE, limited) == []
    (warning,) = check_space(tmp_path / "run", SIZE, training())
    assert "10 checkpoints of 4 GB" in warning and "all are kept" in warning


def test_what_a_run_holds_already_is_not_counted_again(training, free, tmp_path):
    for step in (2, 4):
        (tmp_path / f"run/checkpoints/step-{step:08d}").mkdir(parents=True)
    free(5 * 10**9)
    assert check_space(tmp_path / "run", SIZE, training("--training.save_total_limit=2")) == []


def test_training_refuses_a_full_disk_before_it_writes_anything(make_recipe, free, tmp_path):
    recipe = make_recipe(tmp_path / "run")
    free(1000)
    with pytest.raises(ValueError, match=r"training.output_dir: .* do not fit"):
        train(recipe)
    assert not (tmp_path / "run/recipe.yaml").exists() and not (tmp_path / "run/checkpoints").exists()


def test_training_warns_of_a_disk_that_will_be_full(make_recipe, free, tmp_path, capfd):
    recipe = make_recipe(tmp_path / "run", "--training.max_steps=4")
    begin = start.from_recipe(recipe, TokenStore.open(recipe.data.path))
    free(round(1.5 * checkpoint_bytes(begin.model, begin.adapter, begin.dtype, ema=False).whole))
    train(recipe)
    assert len(re.findall("the disk will be full before the run is complete", capfd.readouterr().err)) == 1
    assert (tmp_path / "run/final").is_dir()
