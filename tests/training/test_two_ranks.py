"""Two processes over gloo. One launch runs every scenario; a second one resumes what the first left."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.loading import load_model
from retrofit.recipe import Recipe, dump_recipe
from retrofit.training.loop import train
from tests.training.runs import launch, outcome, read_log, state

MakeRecipe = Callable[..., Recipe]

FULL = ("--training.ema_decay=0.9", "--training.eval_steps=3")
LORA = (
    "--lora.r=4", "--lora.lora_alpha=8", "--lora.lora_dropout=0.1", "--training.ema_decay=0.9",
    "--lora.target_modules=[q_proj, v_proj, model.transformer.ff_out]", "--training.sample_steps=6",
)  # fmt: skip
SCENARIOS: dict[str, tuple[str, ...]] = {
    "full": FULL,
    "full-signalled": FULL,
    "lora": LORA,
    "lora-copy": LORA,
    "an_empty_rank": ("--training.documents_per_step=1",),
    "accumulation": ("--training.gradient_accumulation_steps=4", "--training.max_tokens_per_device=512"),
    "auto-tight1": ("--training.max_tokens_per_device=auto",),
    "mdm": ("--objective.name=mdm", "--model.time_hidden_size=null"),
    "diverging": (
        "--optimizer.learning_rate=1e30", "--training.save_steps=1", "--optimizer.lr_scheduler_type=constant",
    ),
    "refused": ("--training.per_device_train_batch_size=8", "--training.gradient_accumulation_steps=1"),
}  # fmt: skip
ALONE = ("full", "an_empty_rank", "accumulation", "mdm")
"""Scenarios that one process runs too. Dropout differs between ranks, so lora is none of them."""


@pytest.fixture(scope="module")
def root(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME` by two processes and `NAME-alone` by one; `full-signalled` is stopped and then resumed."""
    root = tmp_path_factory.mktemp("two")
    names = [*SCENARIOS, "full-resumed"]
    for name in SCENARIOS:
        dump_recipe(make_recipe(root / name, *SCENARIOS[name]), root / f"{name}.yaml")
    shutil.copyfile(root / "full-signalled.yaml", root / "full-resumed.yaml")
    (root / "stderr.txt").write_text(launch("ddp", root, names))
    for name in ALONE:
        train(make_recipe(root / f"{name}-alone", *SCENARIOS[name]))
    return root


@pytest.mark.parametrize("name", ALONE)
def test_two_ranks_train_as_one_does(root: Path, name: str) -> None:
    assert outcome(root, name) == ["complete", "complete"]
    two, one = read_log(root / name), read_log(root / f"{name}-alone")
    assert [(line["kind"], line["step"], line.get("tokens")) for line in two] == [
        (line["kind"], line["step"], line.get("tokens")) for line in one
    ]
    for ours, theirs in zip(two, one, strict=True):
        for key in theirs.keys() & {"loss", "unmasking", "gradient_norm"}:
            # Measured: at most 2e-7, from sums in another order.
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5)


def test_the_log_says_how_even_the_ranks_are(root: Path) -> None:
    """Of a step's only document, one rank computes all rows and the other none."""
    for run, imbalance in (("an_empty_rank", 2.0), ("an_empty_rank-alone", 1.0)):
        found = {line["imbalance"] for line in read_log(root / run) if line["kind"] == "train"}
        assert found == {imbalance}


@pytest.mark.parametrize(("name", "resumed"), [("full", "full-signalled"), ("lora", "lora-copy")])
def test_a_resumed_run_of_two_ranks_is_the_uninterrupted_one_bit_for_bit(root: Path, name: str, resumed: str) -> None:
    whole, again = state(root / name), state(root / resumed)
    assert whole.keys() == again.keys() and any(key.startswith("ema/") for key in whole)
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    assert read_log(root / name) == read_log(root / resumed)


def test_both_ranks_take_less_where_one_runs_out_of_memory(root: Path) -> None:
    """Four documents of 29 rows for each, at most; then 0.85 of them."""
    assert outcome(root, "auto-tight1") == ["complete", "complete"]
    assert (root / "stderr.txt").read_text().count("out of memory at 116 rows a micro-batch; trying 98") == 1
    found = next(line for line in read_log(root / "auto-tight1") if line["kind"] == "budget")
    assert found["max_tokens_per_device"] == 98


def test_a_signal_to_one_rank_stops_both_at_the_same_step(root: Path) -> None:
    assert (
        outcome(root, "full-signalled") == ["exit 75", "exit 75"] and outcome(root, "full-resumed") == ["complete"] * 2
    )
    steps = checkpoint.steps_present(root / "full-signalled" / "checkpoints")
    assert checkpoint.step_name(3) in [path.name for path in steps]


def test_dropout_differs_between_ranks_and_its_state_is_saved_for_each(root: Path) -> None:
    saved = load_file(root / "lora" / "checkpoints" / checkpoint.step_name(6) / checkpoint.RNG_TENSORS)
    assert sorted(saved) == ["rank-00000/cpu", "rank-00001/cpu"]
    assert not torch.equal(saved["rank-00000/cpu"], saved["rank-00001/cpu"])


def test_a_run_goes_on_with_another_number_of_processes(
    root: Path, make_recipe: MakeRecipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two ranks, then one: the same documents and noise; without dropout the same weights but for rounding."""
    for name in ("full", "lora"):
        run = tmp_path / name
        shutil.copytree(root / name, run)
        shutil.rmtree(run / "final")
        shutil.rmtree(run / "checkpoints" / checkpoint.step_name(6))
        train(make_recipe(run, *SCENARIOS[name]))
    assert "dropout is drawn anew" in capfd.readouterr().err
    ours, theirs = (load_model(path / "full")[0].state_dict() for path in (tmp_path, root))
    assert all(torch.allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-6) for key in theirs)


def test_a_loss_that_is_not_finite_stops_both_ranks_and_is_said_once(root: Path) -> None:
    assert outcome(root, "diverging") == ["exit 3", "exit 3"]
    newest, passed_over = checkpoint.latest(root / "diverging" / "checkpoints")
    assert newest is not None and passed_over == []
    assert (root / "stderr.txt").read_text().count(f"last good checkpoint: {newest}") == 1


def test_a_refusal_is_said_by_one_rank(root: Path) -> None:
    first, second = outcome(root, "refused")
    assert first.startswith("refused: training: per_device_train_batch_size: 8") and second == "exit 2"
    assert not (root / "refused").exists()


def test_a_launcher_that_starts_one_process_of_two_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from retrofit.training.processes import check_launch

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_launch(bf16=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="asked for several processes but started one"):
        check_launch(bf16=False)
    monkeypatch.setenv("RANK", "0")
    check_launch(bf16=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="mixed_precision is fp16"):
        check_launch(bf16=True)
