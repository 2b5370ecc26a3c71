from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from retrofit.sections import OptimizerSection
from retrofit.training import optimizer as module
from retrofit.training.ema import Average


class Tiny(nn.Module):
    """Names that decide the groups, with the shapes of a tiny model."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.ParameterDict({"lora_A": nn.Parameter(torch.randn(2, 3))})
        self.wte = nn.Embedding(5, 3)
        self.ff_out = nn.Linear(3, 5)
        self.insertion_head = nn.Linear(3, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.wte(ids) + self.q_proj["lora_A"].sum(0)
        return self.ff_out(hidden).sum() + self.insertion_head(hidden).sum()


def steps(model: Tiny, optimizer: torch.optim.Optimizer, count: int) -> None:
    for i in range(count):
        optimizer.zero_grad()
        (model(torch.tensor([i % 5, 1])) ** 2).backward()
        optimizer.step()


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
    groups = module.build_optimizer(parameters, section).param_groups
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


def test_restored_state_continues_bit_for_bit() -> None:
    torch.manual_seed(0)
    section = OptimizerSection(learning_rate=0.1)
    model, copy = Tiny(), Tiny()
    first = module.build_optimizer(module.trainable_parameters(model), section)
    schedule = module.build_scheduler(first, section, 10)
    steps(model, first, 3)
    schedule.step()
    tensors, adam_step = module.export_state(first, module.trainable_parameters(model))
    assert adam_step == 3 and len(tensors) == 3 * 6 and {t.dtype for t in tensors.values()} == {torch.float32}

    second = module.build_optimizer(module.trainable_parameters(copy), section)
    module.import_state(second, module.trainable_parameters(copy), tensors, adam_step)
    again = module.build_scheduler(second, section, 10)
    module.restore_scheduler(again, json.loads(json.dumps(schedule.state_dict())))
    assert [group["lr"] for group in second.param_groups] == [group["lr"] for group in first.param_groups]
    steps(model, first, 3)
    steps(copy, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_state_of_another_model_is_refused_by_name() -> None:
    model = Tiny()
    optimizer = module.build_optimizer(module.trainable_parameters(model), OptimizerSection(learning_rate=0.1))
    tensors, _ = module.export_state(optimizer, module.trainable_parameters(model))
    tensors["master/stranger"] = tensors.pop("exp_avg/wte.weight")
    with pytest.raises(ValueError, match="2 tensors .* exp_avg/wte.weight, master/stranger"):
        module.import_state(optimizer, module.trainable_parameters(model), tensors, 0)


def test_the_average_follows_its_formula_and_gives_the_weights_back() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    average = Average(module.trainable_parameters(model), decay=0.75)
    nn.init.constant_(model.weight, 3.0)
    average.update()
    with average.in_place():
        assert model.weight.item() == 0.75 * 1 + 0.25 * 3
    assert model.weight.item() == 3.0
    other = Average(module.trainable_parameters(model), decay=0.75)
    other.import_state(average.export_state())
    assert torch.equal(other.values[0], average.values[0])
