"""A FlexMDM of which nothing is zero, as an adapter on a toy LLaDA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from retrofit.checkpoints import adapters
from retrofit.checkpoints.adapters import HEAD, AdapterSettings
from retrofit.data.tiny import init
from retrofit.flexmdm import FlexMDMForMaskedDiffusion
from tests.saves import save_adapter

SETTINGS = AdapterSettings(4, 8.0, 0.0, ("q_proj", "v_proj", HEAD))


def make(root: Path, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    """Writes `root/model` and `root/adapter`, which it returns; everything is drawn, and of full size."""
    init(root / "model", layers=2, d_model=32, heads=2, mlp_hidden=48, max_sequence_length=64, tied=tied)
    settings = AdapterSettings(4, 8.0, 0.0, ("q_proj", "ff_out")) if tied else SETTINGS
    torch.manual_seed(0)
    fields = {
        "base_model": "some/llada",
        "base_revision": "c0ffee",
        "insertion_schedule": {"type": "power", "exponent": 1.7},
    }
    model = FlexMDMForMaskedDiffusion.from_pretrained(root / "model", flexmdm_config=fields, dtype=dtype)
    model.config.dtype = dtype
    adapters.inject(model, settings)
    adapters.select_trainable(model)
    with torch.no_grad():
        for name in adapters.adapter_names(model):
            model.get_parameter(name).add_(0.05 * torch.randn_like(model.get_parameter(name)))
    weights = {name: model.get_parameter(name) for name in adapters.adapter_names(model)}
    save_adapter(root / "adapter", weights, settings, base_model=str(root / "model"), base_revision=None)
    model.config.save_pretrained(root / "adapter")
    return root / "adapter"


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("adapted"))
