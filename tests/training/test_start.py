"""Stages: what a run may start from, and what it takes over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoints import adapters, checkpoint
from retrofit.checkpoints.loading import load_model
from retrofit.data.store import TokenStore
from retrofit.recipe import Recipe
from retrofit.training import start
from retrofit.training.loop import train

MakeRecipe = Callable[..., Recipe]

LORA = ("--lora.r=4", "--lora.lora_alpha=8", "--lora.target_modules=[q_proj, model.transformer.ff_out]")
QUICK = ("--training.max_steps=2", "--model.time_hidden_size=null")
FROM_LLADA = ("--training.max_steps=2", "--model.time_hidden_size=32")


def begin(recipe: Recipe) -> start.Start:
    return start.from_recipe(recipe, TokenStore.open(recipe.data.path, "train"))


def parent_of(run: Path) -> dict[str, str]:
    newest, _ = checkpoint.latest(run / "checkpoints")
    assert newest is not None
    return dict(checkpoint.read_record(newest)["parent"])


def test_the_head_starts_from_the_mean_of_the_data_and_the_config_names_its_base(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path
) -> None:
    config = begin(make_recipe(tmp_path / "run", *FROM_LLADA, "--model.alpha_end=0.99")).model.config
    assert config.mean_deletable_tokens == TokenStore.open(toy / "store").manifest.mean_deletable_tokens
    assert (config.base_model, config.alpha_end, config.time_hidden_size) == ("model", 0.99, 32)


@pytest.mark.parametrize(
    ("asked", "recomputed", "selective"),
    [("false", [], False), ("true", [0, 1], False), ("2", [0], False), ("selective", [0, 1], True)],
)
def test_blocks_are_recomputed_and_compiled_as_the_recipe_says(
    make_recipe: MakeRecipe, tmp_path: Path, asked: str, recomputed: list[int], selective: bool
) -> None:
    options = (f"--training.gradient_checkpointing={asked}", "--training.attention=padded")
    model = begin(make_recipe(tmp_path / "run", *options)).model
    blocks = model.model.blocks
    assert [i for i, block in enumerate(blocks) if block.gradient_checkpointing] == recomputed
    assert ("context_fn" in getattr(blocks[0]._gradient_checkpointing_func, "keywords", {})) == selective
    assert model.model.attention == "padded" and all(block.compiled is None for block in blocks)
    compiled = begin(make_recipe(tmp_path / "run", "--training.compile=true")).model.model
    assert all(block.compiled is not None for block in compiled.blocks) and compiled.attention == "auto"


@pytest.mark.parametrize("place", ["", "final", "checkpoints/step-00000002"])
def test_a_stage_takes_weights_and_the_parents_digest_but_neither_step_nor_optimizer(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, place: str
) -> None:
    parent = runs / "full" / place
    train(make_recipe(tmp_path / "next", *QUICK, f"--model.init_from={parent}", "--optimizer.learning_rate=1e-30"))
    ours, theirs = (load_file(run / "final" / "model.safetensors") for run in (tmp_path / "next", runs / "full"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    recorded = parent_of(tmp_path / "next")
    source = parent if place.startswith("checkpoints") else runs / "full" / "final"
    assert recorded["digest"] == checkpoint.read_manifest(source)["digest"]
    record = checkpoint.read_record(tmp_path / "next" / "checkpoints" / "step-00000002")
    assert record["step"] == record["adam_step"] == 2


def test_the_digest_of_a_released_directory_is_that_of_its_weights(
    make_recipe: MakeRecipe, runs: Path, toy: Path
) -> None:
    digest = parent_of(runs / "full")["digest"]
    assert digest == parent_of(runs / "lora")["digest"]
    assert digest == "sha256:" + checkpoint.digest_of(
        {"model.safetensors": checkpoint.sha256(toy / "model" / "model.safetensors")}
    )


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damaged", ["full/final/model.safetensors", "lora/final/adapter/adapter_model.safetensors"])
def test_a_stage_does_not_start_from_damaged_weights(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, damaged: str
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(runs / damaged.split("/")[0], parent)
    flip_a_byte(parent / damaged.partition("/")[2])
    options = LORA if damaged.startswith("lora") else ()
    with pytest.raises(ValueError, match="damaged or changed since it was written"):
        train(make_recipe(tmp_path / "next", *QUICK, *options, f"--model.init_from={parent}"))


def test_an_adapter_does_not_go_on_over_another_base(make_recipe: MakeRecipe, toy: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toy / "model", base)
    recipe = make_recipe(tmp_path / "run", *FROM_LLADA, *LORA, f"--model.init_from={base}", "--training.save_steps=1")
    train(recipe)
    shutil.rmtree(tmp_path / "run" / "final")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / checkpoint.step_name(2))
    flip_a_byte(base / "model.safetensors")
    with pytest.raises(ValueError, match="not the weights that the adapter in .* was trained over"):
        train(recipe)


def test_a_merge_that_was_killed_does_not_lock_its_directory(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "next"
    recipe = make_recipe(run, *QUICK, *LORA, f"--model.init_from={runs / 'lora'}", "--model.merge_first=true")
    (run / ".writing-base").mkdir(parents=True)
    (run / ".writing-recipe.yaml").write_text("cut")
    train(recipe)
    assert (run / "final").is_dir() and not list(run.glob(".writing-*"))


def test_a_model_with_another_tokenizer_than_the_data_is_refused(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy / "model", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="tokenizer.digest is .* in the data"):
        train(make_recipe(tmp_path / "run", *FROM_LLADA, f"--model.init_from={other}"))


def test_a_token_beyond_the_embedding_is_refused_by_name(make_recipe: MakeRecipe, toy: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(toy / "model", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "content": "<NEW>", "id": 264})
    for index, content in ((262, "<A>"), (263, "<B>")):
        tokenizer["added_tokens"].insert(-1, {**tokenizer["added_tokens"][-1], "content": content, "id": index})
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="token '<NEW>' has id 264, the model has 264 rows"):
        train(make_recipe(tmp_path / "run", *FROM_LLADA, f"--model.init_from={other}"))
    with pytest.raises(ValueError, match="<NEW>"):
        load_model(other)


def test_a_finished_run_without_its_checkpoints_is_not_trained_again(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs / "full", tmp_path / "full")
    shutil.rmtree(tmp_path / "full" / "checkpoints")
    train(make_recipe(tmp_path / "full", *FROM_LLADA))
    assert "is complete at step 2" in capfd.readouterr().err
    assert not list((tmp_path / "full").glob("broken-*"))


def test_a_window_that_the_model_cannot_hold_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", *FROM_LLADA, "--objective.window=64", "--training.max_tokens_per_device=99")
    with pytest.raises(ValueError, match="objective.window: 64 tokens and the end slot exceed the 64 rows .* most 63"):
        train(recipe)


def test_a_field_that_is_newer_than_the_run_has_its_default(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = asdict(make_recipe(tmp_path / "run"))
    older = {name: dict(section) for name, section in recipe.items() if section is not None}
    del older["optimizer"]["min_lr_ratio"], older["sampling"]["chat"]
    start.check_same_run(recipe, older, tmp_path)
    recipe["optimizer"] |= {"min_lr_ratio": 0.5}
    with pytest.raises(ValueError, match="min_lr_ratio is 0.5 and was 0.0"):
        start.check_same_run(recipe, older, tmp_path)


def test_a_run_older_than_time_sampling_had_uniform_t(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = asdict(make_recipe(tmp_path / "run", "--objective.time_sampling=uniform"))
    older = {name: dict(section) for name, section in recipe.items() if section is not None}
    del older["objective"]["time_sampling"]
    start.check_same_run(recipe, older, tmp_path)
    recipe["objective"] |= {"time_sampling": "importance"}
    with pytest.raises(ValueError, match="time_sampling is importance and was uniform"):
        start.check_same_run(recipe, older, tmp_path)


def test_lora_continues_the_same_factors_on_the_same_base(
    make_recipe: MakeRecipe, runs: Path, toy: Path, tmp_path: Path
) -> None:
    parent = runs / "lora" / "final" / "adapter"
    options = (*QUICK, *LORA, f"--model.init_from={parent}", "--lora.lora_dropout=0.5")
    model = begin(make_recipe(tmp_path / "next", *options)).model
    assert {layer.lora_dropout["default"].p for _, layer in adapters.lora_layers(model)} == {0.5}
    train(make_recipe(tmp_path / "next", *options, "--optimizer.learning_rate=1e-30"))
    adapter = tmp_path / "next" / "final" / "adapter"
    ours, theirs = (load_file(folder / adapters.WEIGHTS_FILE) for folder in (adapter, parent))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert json.loads((adapter / adapters.CONFIG_FILE).read_text())["base_model_name_or_path"] == str(toy / "model")


def test_merge_first_writes_the_base_that_new_factors_stand_on(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path
) -> None:
    other = ("--lora.r=2", "--lora.lora_alpha=2", "--lora.target_modules=[v_proj]")
    options = (*QUICK, *other, f"--model.init_from={runs / 'lora'}", "--model.merge_first=true")
    recipe = make_recipe(tmp_path / "next", *options)
    train(recipe)
    parent, _ = load_model(runs / "lora")
    base, _ = load_model(tmp_path / "next" / "base")
    ids, t = torch.tensor([[97, 258, 99]]), torch.tensor([0.4])
    assert torch.allclose(base(ids, timesteps=t).logits, parent(ids, timesteps=t).logits, atol=1e-5)
    model, _ = load_model(tmp_path / "next")
    assert [name.rpartition(".")[2] for name, _ in adapters.lora_layers(model)] == ["v_proj", "v_proj"]


def test_merge_first_without_lora_trains_all_weights(make_recipe: MakeRecipe, runs: Path, tmp_path: Path) -> None:
    options = (*QUICK, f"--model.init_from={runs / 'lora'}", "--model.merge_first=true")
    train(make_recipe(tmp_path / "next", *options))
    model, _ = load_model(tmp_path / "next")
    assert not adapters.is_adapted(model) and (tmp_path / "next" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--model.init_from=FULL", "--objective.name=mdm"), "objective.name: mdm cannot train .* is a FlexMDM"),
        (
            ("--model.init_from=FULL", "--model.insertion_schedule={type: power, exponent: 1.7}"),
            "model.insertion_schedule: .*exponent.* was trained with .*linear",
        ),
        (
            ("--model.init_from=FULL", "--model.time_input=t"),
            "model.time_input: t in the recipe, .* trained with alpha",
        ),
        (("--model.init_from=LORA",), "is an adapter and the recipe has no section lora; set model.merge_first: true"),
        (("--model.init_from=LORA", *LORA, "--lora.r=8"), "lora: r is 8 and 4 in the recipe and in"),
        (("--model.init_from=FULL", "--model.merge_first=true"), "model.merge_first: .* is no adapter"),
        ((*LORA, "--model.dtype=bfloat16"), "model.dtype: bfloat16 weights need training.bf16: true"),
        (
            ("--lora.r=4", "--lora.lora_alpha=8", "--lora.target_modules=[q_proj, o_proj]"),
            "o_proj .* nearest: attn_out",
        ),
        (("--model.init_from=nowhere/at/all",), "nowhere/at/all: no such directory"),
    ],
)
def test_contradictions_are_refused_and_nothing_is_written(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    places = {"FULL": str(runs / "full"), "LORA": str(runs / "lora")}
    filled = {option.partition("=")[0]: option for option in (*QUICK, *options)}  # the later one counts
    overrides = [option.replace("FULL", places["FULL"]).replace("LORA", places["LORA"]) for option in filled.values()]
    with pytest.raises(ValueError, match=message) as refusal:
        train(make_recipe(tmp_path / "next", *overrides))
    assert "\n" not in str(refusal.value)
    assert sorted(path.name for path in (tmp_path / "next").iterdir()) == ["lock.json", "outcome.json"]


def test_the_same_schedule_may_be_repeated(make_recipe: MakeRecipe, runs: Path, tmp_path: Path) -> None:
    options = (
        f"--model.init_from={runs / 'full'}",
        "--model.insertion_schedule={type: linear}",
        "--model.alpha_end=0.999",
    )
    assert begin(make_recipe(tmp_path / "next", *QUICK, *options)).model.config.alpha_end == 0.999


def test_a_stage_on_a_merged_base_resumes_bit_for_bit(make_recipe: MakeRecipe, runs: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path / "next", *QUICK, *LORA, f"--model.init_from={runs / 'lora'}", "--model.merge_first=true",
        "--training.save_steps=1",
    )  # fmt: skip
    train(recipe)
    last = tmp_path / "next" / "checkpoints" / checkpoint.step_name(2)
    before = load_file(last / checkpoint.state_file(0, 1))
    shutil.rmtree(last)
    shutil.rmtree(tmp_path / "next" / "final")
    train(recipe)
    after = load_file(last / checkpoint.state_file(0, 1))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
