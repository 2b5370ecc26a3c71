"""`training.max_tokens_per_device: auto` in one process; of several, `test_two_ranks` and `test_engines`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.checkpoints import checkpoint
from retrofit.data.store import TokenStore
from retrofit.probe import Probe, no_probe
from retrofit.recipe import Recipe, load_recipe
from retrofit.training import budget, start
from retrofit.training.budget import Budget, _recorded, choose_budget, try_budget
from retrofit.training.engines.replicated import ReplicatedEngine
from retrofit.training.estimate import Layout
from retrofit.training.loop import build_objective, train
from retrofit.training.optimizer import build_optimizer
from tests.faults import fail_at, out_of_memory
from tests.training.runs import read_log, state

MakeRecipe = Callable[..., Recipe]

LONGEST = 29
"""Rows of the toy store's longest document, its slot included."""
WHOLE = 8 * LONGEST
"""Rows that a step of eight documents cannot exceed."""
OPTIONS = (
    "--lora.r=4", "--lora.lora_alpha=8", "--lora.lora_dropout=0.1", "--lora.target_modules=[q_proj]",
    "--training.gradient_checkpointing=true", "--training.eval_steps=3",
)  # fmt: skip


def run(make_recipe: MakeRecipe, path: Path, rows: int | str, probe: Probe = no_probe) -> list[dict[str, Any]]:
    """Trains with a budget; the log without the record of the budget."""
    train(make_recipe(path, f"--training.max_tokens_per_device={rows}", *OPTIONS), probe=probe)
    return [line for line in read_log(path) if line["kind"] != "budget"]


def found(path: Path) -> dict[str, Any]:
    return next(line for line in read_log(path) if line["kind"] == "budget")


def equal(ours: Path, theirs: Path) -> bool:
    one, other = state(ours), state(theirs)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def auto(make_recipe: MakeRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "auto"
    run(make_recipe, path, "auto")
    return path


def test_a_budget_that_was_found_trains_as_the_same_number_does(
    make_recipe: MakeRecipe, auto: Path, tmp_path: Path
) -> None:
    """Bit for bit, dropout and held-out losses included: trying it leaves nothing behind."""
    assert found(auto)["max_tokens_per_device"] == WHOLE
    log = run(make_recipe, tmp_path / "number", WHOLE)
    assert log == [line for line in read_log(auto) if line["kind"] != "budget"]
    assert equal(auto, tmp_path / "number")


def test_the_budget_is_said_and_kept_in_the_log_and_in_checkpoints(auto: Path) -> None:
    record = found(auto)
    assert record["step"] == 0 and record["moments"] == 2 * record["trained"] > 0 and record["frozen"] > 0
    kept = checkpoint.read_record(auto / "checkpoints" / checkpoint.step_name(2))
    assert kept["max_tokens_per_device"] == WHOLE
    assert load_recipe(auto / "recipe.yaml").training.max_tokens_per_device == "auto"


def test_where_the_trial_runs_out_of_memory_less_is_tried_and_a_resumed_run_knows(
    make_recipe: MakeRecipe, auto: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tight, again = tmp_path / "tight", tmp_path / "again"
    log = run(make_recipe, tight, "auto", fail_at(0, 1, "trial forward", out_of_memory, times=2))
    said = capsys.readouterr().err
    assert (
        "out of memory at 232 rows a micro-batch; trying 197" in said and "197 rows a micro-batch; trying 167" in said
    )
    assert found(tight)["activations"] < found(auto)["activations"]  # of 167 rows, rather than of 232
    assert found(tight)["max_tokens_per_device"] == 167 and said.count("auto is 167 rows: an estimated") == 1
    assert log == run(make_recipe, tmp_path / "number", 167) and equal(tight, tmp_path / "number")

    shutil.copytree(tight, again)
    shutil.rmtree(again / "final")
    for later in (4, 6):
        shutil.rmtree(again / "checkpoints" / checkpoint.step_name(later))
    capsys.readouterr()
    assert run(make_recipe, again, "auto") == log and equal(again, tight)
    assert "auto is 167 rows, as before this start" in capsys.readouterr().err


def test_a_step_is_cut_by_the_budget_that_was_tried(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by the one that was estimated."""
    forwards: list[int] = []

    def count(where: str, step: int, subject: Any = None) -> None:
        forwards.extend([step] if where == "forward" else [])

    log = run(make_recipe, tmp_path / "number", 40, count)
    expected, forwards[:] = list(forwards), []
    assert len(expected) > 6
    monkeypatch.setattr("retrofit.training.loop.try_budget", lambda found, *_: replace(found, rows=40))
    assert run(make_recipe, tmp_path / "auto", "auto", count) == log and forwards == expected


def test_trying_a_budget_leaves_the_model_as_it_was(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", *OPTIONS)
    begin = start.from_recipe(recipe, TokenStore.open(recipe.data.path))
    objective = build_objective(recipe, begin.model.config, 0)
    alone: Any = SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu"), gather=lambda value: [value])
    engine = ReplicatedEngine(alone, bf16=False, average=False)
    engine.prepare(begin.model, begin.read, lambda trained: build_optimizer(trained, frozenset(), recipe.optimizer))
    found = Budget(64, LONGEST, automatic=True)
    told: list[str] = []
    masks: list[int] = []
    head = engine.model.get_output_embeddings()
    head.register_forward_hook(lambda _, inputs, __: masks.append(len(inputs[0])))
    assert try_budget(found, engine, objective, begin.model.config, told.append) is found
    assert told == ["trial forward", "trial backward"] * 2 and masks == [64, 64]  # all rows are masks
    assert not engine.model.training and all(parameter.grad is None for _, parameter in engine.parameters)


def test_only_a_run_that_computes_alike_takes_what_was_found(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(tmp_path / "run", "--training.max_tokens_per_device=auto")
    before = asdict(recipe)
    record = {"engine": "zero2", "world_size": 4, "max_tokens_per_device": 77, "recipe": before}
    assert _recorded(record, recipe, Layout("zero2", 4)) == 77
    assert _recorded(record, recipe, Layout("zero3", 4)) is None
    assert _recorded(record, recipe, Layout("zero2", 8)) is None
    for name, value in (("max_tokens_per_device", 77), ("gradient_checkpointing", "selective"), ("bf16", True)):
        other = {**before, "training": {**before["training"], name: value}}
        assert _recorded({**record, "recipe": other}, recipe, Layout("zero2", 4)) is None


def test_the_rank_with_the_least_memory_decides(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path / "run", "--training.max_tokens_per_device=auto", "--training.documents_per_step=4096"
    )
    store = TokenStore.open(recipe.data.path)

    def choose(*others: int) -> Budget:
        begin = start.from_recipe(recipe, store)
        ranks: Any = SimpleNamespace(
            kind="ddp", world_size=1, device=torch.device("cpu"), is_main=True,
            gather=lambda value: [value, *others], on_main=lambda find: find(),
        )  # fmt: skip
        return choose_budget(recipe, begin, build_objective(recipe, begin.model.config, 0), store, ranks, None, None)

    ample, tight = choose(1 << 50), choose(2 << 20)
    assert tight.usable == 2 << 20 and tight.rows < ample.rows and tight.automatic


@pytest.mark.parametrize(
    ("documents", "trials", "message"),
    [
        (2, [58, 49, 41, 34], "at 29 rows a micro-batch; set"),  # rather than 28: the longest document
        (8, [232, 197, 167, 141, 119], "at 101 rows a micro-batch; give a smaller number, for example 85, set"),
    ],
)
def test_trials_end_at_the_longest_document_or_after_six(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    documents: int,
    trials: list[int],
    message: str,
) -> None:
    options = ("--training.max_tokens_per_device=auto", f"--training.documents_per_step={documents}")
    with pytest.raises(ValueError, match=f"max_tokens_per_device: auto: out of memory {message}"):
        train(
            make_recipe(tmp_path / "run", *options),
            probe=fail_at(None, None, "trial forward", out_of_memory, times=100),
        )
    assert [int(at) for at in re.findall(r"out of memory at (\d+) rows", capsys.readouterr().err)] == trials
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_another_error_in_the_trial_is_no_lack_of_memory(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        run(make_recipe, tmp_path / "run", "auto", fail_at(0, 1, "trial forward", fail))


def test_the_budget_is_the_most_that_memory_holds(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, auto: Path
) -> None:
    whole = found(auto)
    parts = sum(
        value for name, value in whole.items() if name not in ("step", "kind", "max_tokens_per_device", "usable")
    )
    monkeypatch.setattr(budget, "usable_memory", lambda device, ranks: int(0.8 * parts))
    run(make_recipe, tmp_path / "run", "auto")
    assert found(tmp_path / "run")["max_tokens_per_device"] == 128  # multiples of it
    monkeypatch.setattr(budget, "usable_memory", lambda device, ranks: 100_000)
    with pytest.raises(
        ValueError, match="the longest document, of 29 rows, needs an estimated .* may fill 0.10 MB; set"
    ):
        run(make_recipe, tmp_path / "small", "auto")
