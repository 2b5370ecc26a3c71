"""Runs that other runs start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retrofit.recipe import Recipe
from retrofit.training.loop import train

FROM_LLADA = ("--training.max_steps=2", "--model.time_hidden_size=32")
LORA = ("--lora.r=4", "--lora.lora_alpha=8", "--lora.target_modules=[q_proj, model.transformer.ff_out]")


@pytest.fixture(scope="session")
def runs(make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`full` and `lora`, both two steps from the plain LLaDA; to be left as they are."""
    root = tmp_path_factory.mktemp("parents")
    train(make_recipe(root / "full", *FROM_LLADA))
    train(make_recipe(root / "lora", *FROM_LLADA, *LORA))
    return root
