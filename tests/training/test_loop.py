"""Whole runs of the toy in one process."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.loading import load_model
from retrofit.checkpoints.weights import materialise
from retrofit.data.store import TokenStore
from retrofit.data.stream import StepStream
from retrofit.flexmdm import FlexMDMForMaskedDiffusion
from retrofit.flexmdm.attention import padding
from retrofit.recipe import Recipe
from retrofit.training import start
from retrofit.training.loop import build_objective, train
from retrofit.training.throughput import UsefulFlops, Work
from tests.faults import disk_full, fail_at, out_of_memory

MakeRecipe = Callable[..., Recipe]

LORA = (
    "--lora.r=4", "--lora.lora_alpha=8", "--lora.lora_dropout=0.1",
    "--lora.target_modules=[q_proj, v_proj, model.transformer.ff_out]",
)  # fmt: skip
TIMINGS = (
    "documents_per_second", "tokens_per_second", "tflops_per_second", "seconds_per_step", "seconds_waiting",
    "seconds_saving", "peak_memory_gb",
)  # fmt: skip


def read_log(run: Path) -> list[dict[str, Any]]:
    """The log without its timings; a number that JSON does not know is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (run / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=refuse) for line in lines]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def step_directory(run: Path, step: int) -> Path:
    return run / "checkpoints" / checkpoint.step_name(step)


def assert_equal_runs(run: Path, other: Path, step: int = 6) -> None:
    """Training state, loadable weights and log are equal bit for bit."""
    for name in ("training_state-00001-of-00001.safetensors",):
        ours, theirs = load_file(step_directory(run, step) / name), load_file(step_directory(other, step) / name)
        assert ours.keys() == theirs.keys()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    weights = [
        next(iter(sorted(directory.rglob("*model.safetensors")))) for directory in (run / "final", other / "final")
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert read_log(run) == read_log(other)


def interrupted_copy(run: Path, copy: Path, step: int) -> None:
    """What is left of a run that was killed between `step` and the next checkpoint."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    for directory in checkpoint.steps_present(copy / "checkpoints"):
        if int(directory.name[5:]) > step:
            shutil.rmtree(directory)


@pytest.fixture(scope="module")
def full_run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps of all weights, averaged; lines of the log every four steps only."""
    run = tmp_path_factory.mktemp("runs") / "full"
    train(make_recipe(run, *FULL))
    return run


FULL = (
    "--training.ema_decay=0.9", "--training.logging_steps=4", "--training.eval_steps=3", "--training.sample_steps=3",
    "--sampling.steps=4", "--sampling.prompts=['', ab]",
)  # fmt: skip


def test_a_run_has_what_it_promises(full_run: Path) -> None:
    names = {path.name for path in full_run.iterdir()}
    assert names == {
        "recipe.yaml", "environment.json", "log.jsonl", "samples.jsonl", "checkpoints", "final", "lock.json",
        "outcome.json",
    }  # fmt: skip
    assert [path.name for path in checkpoint.steps_present(full_run / "checkpoints")] == [
        "step-00000002", "step-00000004", "step-00000006"
    ]  # fmt: skip
    log = read_log(full_run)
    assert [(line["kind"], line["step"]) for line in log] == [
        ("held_out", 0), ("held_out", 3), ("train", 4), ("train", 6), ("held_out", 6)
    ]  # fmt: skip
    assert all(line["loss"] == pytest.approx(line["unmasking"] + line["insertion"]) for line in log)
    samples = [json.loads(line) for line in (full_run / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["prompt"]) for s in samples] == [(3, ""), (3, "ab"), (6, ""), (6, "ab")]
    assert all(s["text"].startswith(s["prompt"]) and s["sampling"]["steps"] == 4 for s in samples)


def test_held_out_loss_is_over_uniform_t_however_training_draws_it(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    logs = []
    for name in ("uniform", "importance"):
        options = (f"--objective.time_sampling={name}", "--training.max_steps=1", "--training.eval_steps=5")
        train(make_recipe(tmp_path / name, *options))
        logs.append(read_log(tmp_path / name))
    (start, step, *_), (other_start, other_step, *_) = logs
    assert start["kind"] == "held_out" and start == other_start
    assert step["kind"] == "train" and step["loss"] != other_step["loss"]


def test_the_attention_that_was_chosen_is_said_once_and_recorded(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: Any
) -> None:
    train(make_recipe(tmp_path / "run", "--training.max_steps=2"))
    assert capfd.readouterr().err.count("attention: padded (training.attention: auto)") == 1
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["attention"] == "padded"


def test_nothing_in_a_run_is_pickled(full_run: Path) -> None:
    suffixes = {path.suffix for path in full_run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".yaml", ".safetensors", ".jinja"}


def test_loadable_weights_are_the_average_and_masters_are_in_the_state(full_run: Path) -> None:
    step = step_directory(full_run, 6)
    state, weights = (
        load_file(step / "training_state-00001-of-00001.safetensors"),
        load_file(step / "model.safetensors"),
    )
    assert {f"ema/{name}" for name in weights} == {key for key in state if key.startswith("ema/")}
    assert all(torch.equal(state[f"ema/{name}"], tensor) for name, tensor in weights.items())
    assert any(not torch.equal(state[f"master/{name}"], tensor) for name, tensor in weights.items())
    model = FlexMDMForMaskedDiffusion.from_pretrained(step)
    assert torch.equal(model.state_dict()["insertion_head.output.weight"], weights["insertion_head.output.weight"])
    loaded, tokenizer = load_model(full_run)
    assert loaded.config.time_hidden_size == 32 and tokenizer.encode("a", add_special_tokens=False) == [97]


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "full"
    interrupted_copy(full_run, run, step)
    train(make_recipe(run, *FULL))
    assert_equal_runs(run, full_run)
    assert (run / "log-superseded-1.jsonl").is_file() and (run / f"environment-step-{step:08d}.json").is_file()


def test_lora_with_dropout_and_workers_resumes_bit_for_bit_and_its_adapter_is_plain_pefts(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_recipe(whole, *LORA))
    interrupted_copy(whole, cut, 2)
    train(make_recipe(cut, *LORA, "--data.num_workers=2"))
    assert_equal_runs(cut, whole)

    ours, _ = load_model(whole / "final")
    config = type(ours.config).from_pretrained(whole / "final")
    base = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model", config=config)
    plain = PeftModel.from_pretrained(base, str(whole / "final" / "adapter")).eval()
    ids, t = torch.tensor([[97, 258, 99]]), torch.tensor([0.4])
    for name in ("logits", "expected_gaps"):
        assert torch.equal(getattr(plain(ids, timesteps=t), name), getattr(ours(ids, timesteps=t), name))


def test_four_micro_batches_give_the_loss_of_one_four_times_as_large(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    runs = {count: tmp_path / str(count) for count in (1, 4)}
    for count, run in runs.items():
        options = (f"--training.gradient_accumulation_steps={count}", "--training.max_tokens_per_device=512")
        train(make_recipe(run, *options))
    one, four = read_log(runs[1]), read_log(runs[4])
    for name in ("loss", "unmasking", "insertion", "gradient_norm"):
        # Measured: at most 2e-7 over six steps, the rounding of sums in another order.
        assert [line[name] for line in four] == pytest.approx([line[name] for line in one], rel=1e-5)
    assert [line["tokens"] for line in four] == [line["tokens"] for line in one]


OURS = ("lock.json", "outcome.json")
"""What every start writes anew."""


def test_a_finished_run_is_left_as_it_is(make_recipe: MakeRecipe, full_run: Path, capfd: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in full_run.rglob("*") if path.name not in OURS}
    train(make_recipe(full_run, *FULL))
    assert "is complete at step 6" in capfd.readouterr().err
    after = {path: path.stat().st_mtime_ns for path in full_run.rglob("*") if path.name not in OURS}
    assert {k: v for k, v in after.items() if k != full_run} == {k: v for k, v in before.items() if k != full_run}


def test_broken_checkpoints_are_passed_over_named_and_kept(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    interrupted_copy(full_run, run, 4)
    broken = step_directory(run, 4) / "training_state-00001-of-00001.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    step_directory(run, 6).mkdir()
    train(make_recipe(run, *FULL))
    said = capfd.readouterr().err
    assert "step-00000006 is passed over: manifest.json is missing" in said
    assert "step-00000004 is passed over: training_state-00001-of-00001.safetensors has" in said
    assert f"resuming {step_directory(run, 2)}" in said
    assert_equal_runs(run, full_run)
    assert sorted(path.name for path in (run / "checkpoints").glob("broken-*")) == [
        "broken-1-step-00000004", "broken-1-step-00000006"
    ]  # fmt: skip


def snapshot(directory: Path) -> dict[str, bytes]:
    """Contents of all files except the lock."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != "lock.json")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--data.path=OTHER", "data.path: .*other_store has digest .* was trained on data of digest"),
        ("--training.seed=1", "holds a run of another recipe .training.seed is 1 and was 0."),
        ("--optimizer.learning_rate=0.02", "optimizer.learning_rate is 0.02 and was 0.01"),
        ("--training.max_steps=8", "training.max_steps is 8 and was 6"),
    ],
)
def test_resuming_with_other_data_or_another_recipe_is_refused_and_changes_nothing(
    make_recipe: MakeRecipe, full_run: Path, toy: Path, tmp_path: Path, override: str, message: str
) -> None:
    run = tmp_path / "run"
    interrupted_copy(full_run, run, 4)
    before = snapshot(run)
    with pytest.raises(ValueError, match=message):
        train(make_recipe(run, *FULL, override.replace("OTHER", str(toy / "other_store"))))
    assert snapshot(run) == before


def test_fields_that_do_not_change_the_mathematics_may_change(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted_copy(full_run, run, 4)
    train(make_recipe(run, *FULL, "--training.save_steps=1", "--training.save_total_limit=2"))
    assert [path.name[-1] for path in checkpoint.steps_present(run / "checkpoints")] == ["5", "6"]


def test_divergence_stops_before_the_update_and_no_checkpoint_holds_it(
    make_recipe: MakeRecipe, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    options = ("--optimizer.learning_rate=1e30", "--training.save_steps=1", "--optimizer.lr_scheduler_type=constant")
    with pytest.raises(SystemExit) as stop:
        train(make_recipe(run, *options))
    assert stop.value.code == 3
    said = capfd.readouterr().err
    newest, passed_over = checkpoint.latest(run / "checkpoints")
    assert newest is not None and passed_over == [] and f"last good checkpoint: {newest}" in said
    last = read_log(run)[-1]
    assert last["kind"] == "stopped" and f"step {last['step']}" in said and "draws" in said
    for directory in checkpoint.steps_present(run / "checkpoints"):
        assert all(
            t.isfinite().all() for t in load_file(directory / "training_state-00001-of-00001.safetensors").values()
        )


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path, capfd: Any
) -> None:
    run = tmp_path / "run"
    train(make_recipe(run, *FULL), probe=fail_at(0, 4, "save.block", disk_full))
    assert "step-00000004 could not be saved (No space left on device" in capfd.readouterr().err
    assert [path.name[-1] for path in checkpoint.steps_present(run / "checkpoints")] == ["2", "6"]
    assert (
        load_file(run / "final" / "model.safetensors").keys()
        == load_file(full_run / "final" / "model.safetensors").keys()
    )


LONG = ("--training.max_steps=60", "--training.save_steps=10")


def start_in_background(recipe: Recipe) -> BaseProcess:
    """The run in a process of its own, forked to save the imports; returns once its first checkpoint is there."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(recipe,))
    process.start()
    while not (step_directory(Path(recipe.training.output_dir), 10) / checkpoint.MANIFEST).is_file():
        assert process.is_alive()
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def long_run(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "long"
    train(make_recipe(run, *LONG))
    return run


def test_a_signal_saves_and_exits_for_requeueing_and_a_second_run_is_refused_meanwhile(
    make_recipe: MakeRecipe, long_run: Path, tmp_path: Path, capfd: Any
) -> None:
    recipe = make_recipe(tmp_path / "run", *LONG)
    process = start_in_background(recipe)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)  # or it might end before the second run has looked
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
        train(recipe)
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGCONT)
    process.join(60)
    assert process.exitcode == 75 and "stopped by SIG" in capfd.readouterr().err
    assert not (tmp_path / "run" / "final").exists()
    train(recipe)
    assert_equal_runs(tmp_path / "run", long_run, 60)


def test_a_killed_run_goes_on_bit_for_bit(make_recipe: MakeRecipe, long_run: Path, tmp_path: Path, capfd: Any) -> None:
    recipe = make_recipe(tmp_path / "run", *LONG)
    process = start_in_background(recipe)
    process.kill()
    process.join(60)
    assert not (tmp_path / "run" / "final").exists()
    train(recipe)
    assert f"held by process {process.pid}" in capfd.readouterr().err
    assert_equal_runs(tmp_path / "run", long_run, 60)


def test_a_run_whose_data_worker_is_killed_says_so_in_one_line_and_can_be_started_again(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path, capfd: Any
) -> None:
    """The worker is ahead, and another step is under way when it is gone."""

    def kill_worker(_: Any) -> None:
        (worker,) = multiprocessing.active_children()
        worker.kill()

    run = tmp_path / "run"
    recipe = make_recipe(run, *FULL, "--data.num_workers=1")
    with pytest.raises(SystemExit) as stop:
        train(recipe, probe=fail_at(0, 1, "forward", kill_worker))
    assert stop.value.code == 4
    lines = [line for line in capfd.readouterr().err.splitlines() if "DataLoader" in line]
    assert len(lines) == 1 and "start the same command again" in lines[0]
    assert json.loads((run / "outcome.json").read_text())["exit_code"] == 4
    train(recipe)
    assert_equal_runs(run, full_run)


def test_the_log_adds_up_all_micro_batches_of_all_its_steps(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """Tokens, slots, padding and useful FLOPs, against the stream's own micro-batches."""
    run = tmp_path / "run"
    recipe = make_recipe(run, "--training.max_tokens_per_device=32", "--training.logging_steps=3")
    train(recipe)
    model = load_model(run / "final")[0]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    flops = UsefulFlops(model.config, shapes, list(shapes))
    section, store = recipe.training, TokenStore.open(recipe.data.path)
    stream = StepStream(
        store, build_objective(recipe, model.config, section.seed), seed=section.seed,
        documents_per_step=section.documents_per_step, time_strata=section.documents_per_step,
        max_tokens_per_device=32, max_steps=6,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [3, 6]
    for line, steps in zip(lines, (range(3), range(3, 6)), strict=True):
        batches = [batch for step in steps for batch in stream[step].micro_batches]
        assert len(batches) > 6
        padded = sum(padding(batch.packed, "padded", uniform=False) for batch in batches)
        assert padded > 0 and line["padding_per_step"] == pytest.approx(padded / 3)
        assert line["slots_per_step"] == 8
        assert line["tokens_per_step"] == pytest.approx(sum(batch.num_tokens for batch in batches) / 3 - 8)
        useful = sum(flops(Work.of(batch)) for batch in batches)
        # The time conditioning's rows are a step's documents, however they are cut.
        assert 3 * line["tflops_per_second"] * line["seconds_per_step"] * 1e12 == pytest.approx(useful, rel=1e-9)


def test_out_of_memory_in_a_step_is_one_line_with_the_remedy(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"step 3: rank 0 is out of memory; .* up to \d+ rows: .*max_tokens_per_device"
    ):
        train(recipe, probe=fail_at(0, 3, "backward", out_of_memory))
    assert json.loads((tmp_path / "run" / "outcome.json").read_text())["exit_code"] == 2


def test_the_first_step_is_the_loss_over_documents_times_window_and_its_clipped_update(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """Loss and norm in the log, and the gradient that is used, written out from the model and its documents."""
    options = ("--training.max_steps=1", "--optimizer.max_grad_norm=0.01", "--optimizer.weight_decay=0")
    recipe = make_recipe(tmp_path / "run", *options)
    store = TokenStore.open(recipe.data.path, "train")
    begin = start.from_recipe(recipe, store)
    materialise(begin.model, begin.read)
    model = begin.model
    objective = build_objective(recipe, model.config, recipe.training.seed)
    stream = StepStream(
        store, objective, seed=0, documents_per_step=8, time_strata=8, max_tokens_per_device=10_000, max_steps=1
    )
    (batch,) = stream[0].micro_batches
    loss = torch.stack([term.sum() for term in objective.loss_terms(model, batch).values()]).sum() / (8 * 32)
    loss.backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in model.parameters()]))

    train(recipe)
    line = next(line for line in read_log(tmp_path / "run") if line["kind"] == "train")
    assert line["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert line["gradient_norm"] == pytest.approx(float(norm), rel=1e-5) and norm > 0.01
    moments = load_file(step_directory(tmp_path / "run", 1) / "training_state-00001-of-00001.safetensors")
    for name, parameter in model.named_parameters():
        clipped = parameter.grad * (0.01 / (norm + 1e-6))
        assert torch.allclose(moments[f"exp_avg/{name}"], 0.1 * clipped, rtol=1e-4, atol=1e-9)


def test_a_checkpoint_that_was_resumed_and_then_rotated_away_is_not_needed(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_recipe(whole, *FULL))
    interrupted_copy(whole, cut, 2)
    train(make_recipe(cut, *FULL, "--training.save_steps=1", "--training.save_total_limit=1"))
    assert [path.name for path in checkpoint.steps_present(cut / "checkpoints")] == ["step-00000006"]
    for directory in (cut, cut / "checkpoints" / "step-00000006"):
        _, tokenizer = load_model(directory)
        assert tokenizer.decode(tokenizer("a b")["input_ids"]) == "a b"


def test_the_plain_mdm_trains_and_resumes_too(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    options = ("--objective.name=mdm", "--model.time_hidden_size=null", "--training.eval_steps=6")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(make_recipe(whole, *options))
    interrupted_copy(whole, cut, 4)
    train(make_recipe(cut, *options))
    assert_equal_runs(cut, whole)
    assert all(line["loss"] == line["unmasking"] for line in read_log(whole))
    assert json.loads((whole / "final" / "config.json").read_text())["model_type"] == "llada"


def test_bfloat16_compute_keeps_float32_masters(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(
        make_recipe(
            run, *LORA, "--training.bf16=true", "--model.dtype=bfloat16", "--training.gradient_checkpointing=true"
        )
    )
    state = load_file(step_directory(run, 6) / "training_state-00001-of-00001.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    model, _ = load_model(run)
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--training.sample_steps=2", f"--sampling.prompts=[{'a' * 32}]"),
            "sampling.prompts: .* has 32 tokens, the window 32",
        ),
        (
            ("--training.per_device_train_batch_size=4", "--training.gradient_accumulation_steps=1"),
            "on 1 ranks makes 4",
        ),
        (("--training.report_to=[wandb]",), "report_to: wandb is not installed"),
        (("--objective.window=20",), "longest document has .* the window of the recipe is 20"),
        (("--data.path=nowhere",), "nowhere: "),
        (
            ("--training.max_tokens_per_device=20",),
            "20 rows cannot hold the longest document of .*, (2[0-9]) tokens and its end slot; make it at least 2",
        ),
        (
            ("--training.attention=varlen", "--training.bf16=true"),
            "^training.attention: varlen needs a CUDA device, and this one is cpu; mend that, or choose auto$",
        ),
        (("--training.attention=flex",), "^training.attention: flex needs a CUDA device"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], message: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match=message):
        train(make_recipe(tmp_path / "run", *options))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_token_budget_below_the_window_will_do_for_documents_that_fit(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path
) -> None:
    rows = TokenStore.open(toy / "store").longest + 1
    assert rows < 32  # the window
    options = ("--training.max_steps=2", f"--training.max_tokens_per_device={rows}")
    train(make_recipe(tmp_path / "run", *options))
    with pytest.raises(ValueError, match=f"make it at least {rows}, or prepare the data with --max-length {rows - 2}"):
        train(make_recipe(tmp_path / "other", options[0], f"--training.max_tokens_per_device={rows - 1}"))
    interrupted_copy(tmp_path / "run", tmp_path / "resumed", 2)
    with pytest.raises(ValueError, match=f"make it at least {rows}"):
        train(make_recipe(tmp_path / "resumed", options[0], f"--training.max_tokens_per_device={rows - 1}"))


def test_a_run_that_was_cut_before_its_first_checkpoint_starts_again(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted_copy(full_run, run, 0)
    train(make_recipe(run, *FULL))
    assert_equal_runs(run, full_run)


def test_a_run_without_a_good_checkpoint_is_not_overwritten(
    make_recipe: MakeRecipe, full_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    interrupted_copy(full_run, run, 4)
    for step in (2, 4):
        (step_directory(run, step) / checkpoint.MANIFEST).unlink()
    before = snapshot(run)
    with pytest.raises(ValueError, match="no checkpoint in .* verifies"):
        train(make_recipe(run, *FULL))
    assert snapshot(run) == before
