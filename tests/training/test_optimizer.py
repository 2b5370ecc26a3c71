from __future__ import annotations

import pytest
import torch
from torch import nn

from retrofit.sections import OptimizerSection
from retrofit.training import optimizer as module


def test_groups_have_the_documented_rates_and_decay() -> None:
    section = OptimizerSection(learning_rate=1e-3, new_modules_learning_rate=2e-3, weight_decay=0.1)
    parameters = [
        ("model.q_proj.lora_A.default.weight", nn.Parameter(torch.zeros(2, 3))),
        ("model.transformer.wte.weight", nn.Parameter(torch.zeros(5, 3))),
        ("model.transformer.ln_f.weight", nn.Parameter(torch.zeros(3))),
        ("model.transformer.ff_out.weight", nn.Parameter(torch.zeros(5, 3))),
        ("insertion_head.hidden.weight", nn.Parameter(torch.zeros(3, 3))),
        ("insertion_head.hidden.bias", nn.Parameter(torch.zeros(3))),
    ]
    decayed = frozenset(name for name, parameter in parameters if module.has_weight_decay(name, parameter))
    groups = module.build_optimizer(parameters, decayed, section).param_groups
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert [settings[id(parameter)] for _, parameter in parameters] == [
        (1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.0), (1e-3, 0.1), (2e-3, 0.1), (2e-3, 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_rate_rises_once_and_never_comes_back_up(kind: str) -> None:
    section = OptimizerSection(learning_rate=1.0, lr_scheduler_type=kind, warmup_ratio=0.1, min_lr_ratio=0.1)  # type: ignore[arg-type]
    factors = [module.learning_rate_factor(step, section, 100) for step in range(300)]
    assert 0 < factors[0] < 0.2 and max(factors) == factors[10] == 1.0
    assert all(a < b for a, b in zip(factors[:10], factors[1:11], strict=True))
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[299] == pytest.approx(1.0 if kind == "constant" else 0.1)
