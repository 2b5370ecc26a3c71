"""A toy LLaDA, its data and recipes for the tests of the training room."""

from __future__ import annotations

import json
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML

from retrofit.recipe import Recipe, load_recipe

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_process_left() -> Iterator[None]:
    """Python waits at its end for processes that were not joined: a data worker would hang the whole run."""
    yield
    left = multiprocessing.active_children()
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model` (2 layers, d 32), `store` and `other_store`."""
    from retrofit.data.preprocess import preprocess
    from retrofit.data.tiny import init

    root = tmp_path_factory.mktemp("toy")
    init(root / "model", layers=2, d_model=32, heads=2, mlp_hidden=48, max_sequence_length=64)
    for name, seed in (("store", 0), ("other_store", 1)):
        draw = random.Random(seed)
        rows = [{"text": "".join(draw.choices("abcdef ", k=draw.randint(3, 28)))} for _ in range(64)]
        source = root / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        preprocess(
            [str(source)], root / name, tokenizer=str(root / "model"), template="text", max_length=32, held_out=0.1
        )
    return root


@pytest.fixture(scope="session")
def make_recipe(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeRecipe:
    """`make_recipe(output_dir, "--section.field=value", ..., file=...)`: 6 steps of 8 documents."""

    def make(output_dir: Path, *overrides: str, file: Path | None = None) -> Recipe:
        sections: dict[str, Any] = {
            "model": {"init_from": str(toy / "model"), "time_hidden_size": 32},
            "data": {"path": str(toy / "store"), "num_workers": 0},
            "objective": {"name": "flexmdm", "window": 32},
            "optimizer": {"learning_rate": 0.01},
            "training": {
                "output_dir": str(output_dir),
                "max_steps": 6,
                "documents_per_step": 8,
                "max_tokens_per_device": 64,
                "save_steps": 2,
                "logging_steps": 1,
            },
        }
        path = file or tmp_path_factory.mktemp("recipe") / "recipe.yaml"
        with open(path, "w", encoding="utf-8") as stream:
            YAML(typ="safe", pure=True).dump(sections, stream)
        return load_recipe(path, overrides)

    return make
