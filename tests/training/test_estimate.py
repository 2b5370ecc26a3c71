"""The estimate, made of fake tensors, against the same step with live ones on a CPU: the same bytes, part by part.

Of the engines that spread a model, `test_engines` compares what their ranks hold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from retrofit.data.store import TokenStore
from retrofit.recipe import Recipe
from retrofit.training import start
from retrofit.training.engines.base import AVERAGE
from retrofit.training.engines.replicated import ReplicatedEngine
from retrofit.training.estimate import (
    Estimate,
    Layout,
    Parts,
    largest_batch,
    longest_document,
)
from retrofit.training.loop import build_objective
from retrofit.training.memory import LiveBytes
from retrofit.training.optimizer import MOMENTS, build_optimizer, decayed_names

MakeRecipe = Callable[..., Recipe]

LORA = (
    "--lora.r=4", "--lora.lora_alpha=8", "--lora.lora_dropout=0.1",
    "--lora.target_modules=[q_proj, model.transformer.ff_out]",
)  # fmt: skip
BF16 = ("--training.bf16=true",)
CHECKPOINTED = ("--training.gradient_checkpointing=true",)
AVERAGED = ("--training.ema_decay=0.9",)
MDM = ("--objective.name=mdm", "--model.time_hidden_size=null")


class AloneOnTheCPU:
    """The one process of `ReplicatedEngine`."""

    rank, world_size, device = 0, 1, torch.device("cpu")


def estimate(recipe: Recipe) -> Estimate:
    store = TokenStore.open(recipe.data.path)
    begin = start.from_recipe(recipe, store)
    objective = build_objective(recipe, begin.model.config, 0)
    section = recipe.training
    return Estimate(
        begin, objective, longest_document(recipe, store), Layout(), section.bf16, section.ema_decay is not None
    )


def measure(recipe: Recipe, rows: int, longest: int) -> tuple[Parts, int]:
    """Live bytes of the second micro-batch of a real step: (part by part, the peak)."""
    begin = start.from_recipe(recipe, TokenStore.open(recipe.data.path))
    objective = build_objective(recipe, begin.model.config, 0)
    decayed = decayed_names(begin.model)
    section = recipe.training
    engine = ReplicatedEngine(AloneOnTheCPU(), bf16=section.bf16, average=section.ema_decay is not None)  # type: ignore[arg-type]
    engine.prepare(begin.model, begin.read, lambda trained: build_optimizer(trained, decayed, recipe.optimizer))
    engine.model.train()

    def micro_batch(masked: bool) -> None:
        batch = largest_batch(rows, longest, begin.model.config, masked=masked)
        with engine.micro_batch(last=True):
            terms = objective.loss_terms(engine.model, batch)
            engine.backward(torch.stack([term.sum() for term in terms.values()]).sum())

    def size(tensors: Any) -> int:
        return LiveBytes("cpu").count(tensors)

    micro_batch(True)
    states = list(engine.optimizer.state.values())
    weights, trained = list(engine.model.parameters()), engine.masters()
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    peaks = {}
    for masked in (False, True):
        with LiveBytes("cpu") as live:
            live.count([*weights, *gradients, *(value for state in states for value in state.values())])
            before = live.current
            micro_batch(masked)
        peaks[masked] = live.peak - before
    return (
        Parts(
            frozen=size(weights) - size(trained),
            trained=size(trained),
            gradients=size(gradients),
            moments=size([state[kind] for state in states for kind in MOMENTS]),
            average=size([state[AVERAGE] for state in states if AVERAGE in state]),
            gathered=0,
            activations=peaks[False],
            logits=peaks[True] - peaks[False],
        ),
        before + peaks[True],
    )


@pytest.mark.parametrize(
    "options",
    [(), BF16, CHECKPOINTED, (*BF16, *CHECKPOINTED, *AVERAGED), LORA, (*LORA, *BF16, "--model.dtype=bfloat16"),
     (*LORA, *BF16, *CHECKPOINTED), MDM, (*MDM, *BF16, *CHECKPOINTED)],
    ids=lambda options: "-".join(option.rpartition(".")[2] for option in options) or "plain",
)  # fmt: skip
def test_the_estimate_is_what_live_tensors_take(
    make_recipe: MakeRecipe, tmp_path: Path, options: tuple[str, ...]
) -> None:
    recipe = make_recipe(tmp_path / "run", *options)
    expected = estimate(recipe)
    rows = 5 * expected.longest + 3
    parts, peak = measure(recipe, rows, expected.longest)
    ours = expected.parts(rows)
    print(options, ours, parts, peak)
    for name, value in asdict(parts).items():
        print(name, getattr(ours, name), value, getattr(ours, name) - value)
