"""The recipes for LLaDA-8B: the models that they train are built on the meta device, and counted.

What LLaDA-8B has: 32 blocks of d 4096, MLP 12288, vocabulary 126464, in all 8,015,581,184 parameters. The new modules:

    time MLP      4096 -> 16384 -> 4096:  4096 * 16384 + 16384 + 16384 * 4096 + 4096      134,238,208
    modulations   one 4096 -> 8192 for each 8 of 32 blocks:  4 * (4096 * 8192 + 8192)     134,250,496
    flags         2 -> 4096, no bias                                                            8,192
    insertion     LayerNorm 2 * 4096, 4096 -> 4096, 4096 -> 1                              16,793,601
                                                                                          285,290,497
    LoRA factors of rank 128:
    q, k, v       32 * 3 * 128 * (4096 + 4096)                                            100,663,296
    the head      128 * (4096 + 126464)                                                    16,711,680
                                                                                          117,374,976
"""

import json
import os
from pathlib import Path

import pytest
import torch

from retrofit.data.store import TokenStore
from retrofit.flexmdm import LLaDAConfig, LLaDAForMaskedDiffusion
from retrofit.recipe import load_recipe
from retrofit.training import start
from retrofit.training.preflight import checkpoint_bytes, checkpoints_at_once

ROOT = Path(__file__).parents[1]
BASE, NEW, FACTORS = 8_015_581_184, 285_290_497, 117_374_976


@pytest.fixture(scope="session")
def llada_8b(toy, tmp_path_factory):
    """LLaDA-8B in the released layout but for its token ids, its 16 GB of weights a hole in the file."""
    directory = tmp_path_factory.mktemp("llada-8b")
    ids = json.loads((toy / "model/config.json").read_text())
    config = LLaDAConfig(**{name: ids[name] for name in ("mask_token_id", "pad_token_id", "eos_token_id")})
    with torch.device("meta"):
        model = LLaDAForMaskedDiffusion(config)
    config.save_pretrained(directory)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        begin, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    assert end == 2 * BASE and os.stat(file.name).st_blocks * 512 < 10**6
    return directory


@pytest.fixture
def begin(llada_8b, toy):
    """The start of a recipe, and the recipe."""

    def begin(name):
        options = [f"--model.init_from={llada_8b}", f"--data.path={toy / 'store'}"]
        recipe = load_recipe(ROOT / f"recipes/llada-8b/{name}.yaml", options)
        return start.from_recipe(recipe, TokenStore.open(toy / "store")), recipe

    return begin


@pytest.mark.parametrize(
    ("name", "trainable", "total", "weights_itemsize", "at_once"),
    [
        ("transfer", NEW + FACTORS, BASE + NEW + FACTORS, 4, 3 + 1 + 4),  # the paper's 403 million
        ("transfer-full", BASE + NEW, BASE + NEW, 2, 2 + 1),
    ],
)
def test_parameters_and_checkpoints_are_those_derived_by_hand(begin, name, trainable, total, weights_itemsize, at_once):
    started, recipe = begin(name)
    parameters = list(started.model.parameters())
    assert all(parameter.is_meta for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == total
    assert sum(parameter.numel() for parameter in parameters if parameter.requires_grad) == trainable
    size = checkpoint_bytes(started.model, started.adapter, started.dtype, ema=recipe.training.ema_decay is not None)
    assert size.state == 3 * 4 * trainable  # master and two moments, float32
    assert size.weights == weights_itemsize * trainable
    assert checkpoints_at_once(recipe.training) == at_once


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("transfer", ["6.44 GB", "1.61 GB", "6.4 GB"]),
        ("transfer-full", ["116 GB", "16.6 GB", "133 GB", "16.6 GB", "8.3 GB"]),
    ],
)
def test_the_sizes_in_the_header_are_those_of_the_model(name, figures):
    trainable = NEW + (FACTORS if name == "transfer" else BASE)
    training = 16 * trainable / 1e9  # weights, gradients and two moments in float32
    counted = {
        "transfer": [16 * trainable / 1e9, 4 * trainable / 1e9, training],
        "transfer-full": [14 * trainable / 1e9, 2 * trainable / 1e9, training, training / 8, training / 16],
    }[name]
    header = (ROOT / f"recipes/llada-8b/{name}.yaml").read_text().split("\nmodel:")[0]
    for figure, value in zip(figures, counted, strict=True):
        assert figure in header and float(figure.split()[0]) == pytest.approx(value, rel=0.02)


def test_a_step_fits_the_ranks_that_the_headers_name():
    for name, window in (("transfer", 1024), ("transfer-full", 768)):
        recipe = load_recipe(ROOT / f"recipes/llada-8b/{name}.yaml")
        training = recipe.training
        training.check_world_size(16)
        assert recipe.objective.window == window and training.documents_per_step % 16 == 0
        assert training.max_tokens_per_device % (window + 1) == 0
