"""Packed batches of both objectives against documents computed one at a time, and against the dense loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, lora_layers, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig, LLaDAForMaskedDiffusion, llada
from retrofit.flexmdm.attention import BACKENDS, obstacle
from retrofit.objective import FlexMDMObjective, MDMObjective, corrupt, cross_entropy, flexmdm_loss, losses
from retrofit.objective.times import UNIFORM, TimeDensity, importance_density
from tests.kernels import install

SIZES = {
    "vocab_size": 40,
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "mlp_hidden_size": 64,
    "max_sequence_length": 64,
    "mask_token_id": 38,
    "pad_token_id": 39,
    "eos_token_id": 39,
}


def documents(lengths: list[int]) -> SimpleNamespace:
    size = max(lengths)
    generator = torch.Generator().manual_seed(0)
    kept = torch.zeros(len(lengths), size, dtype=torch.bool)
    kept[:, :2] = True
    exists = torch.arange(size) < torch.tensor(lengths)[:, None]
    open_gaps = torch.ones(len(lengths), size + 1, dtype=torch.bool)
    open_gaps[:, :2] = False
    return SimpleNamespace(
        tokens=torch.randint(38, (len(lengths), size), generator=generator).masked_fill(~exists, 39),
        lengths=torch.tensor(lengths),
        kept=kept & exists,
        open_gaps=open_gaps & (torch.arange(size + 1) <= torch.tensor(lengths)[:, None]),
    )


def model_for(config: LLaDAConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    model = (FlexMDMForMaskedDiffusion if isinstance(config, FlexMDMConfig) else LLaDAForMaskedDiffusion)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


LENGTHS = [0, 1, 12, 30, 3]
ORDINALS = torch.tensor([4, 8, 15, 16, 23])
TIMES = torch.tensor([0.1, 0.4, 0.6, 0.3, 0.9], dtype=torch.float64)


def norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.cat([x.double().flatten() for x in tensors]).norm())


@pytest.mark.parametrize("name", ["flexmdm", "mdm"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_of_a_pack_are_sums_over_documents(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of no token, of one, and of as many as the model takes; and micro-batches that have none.

    Without a GPU the kernels are stand-ins, and flex attention has no backward: there the loss alone is compared.
    Measured in float32, of all losses and of all gradients together: 2e-8 and 5e-7. A GPU's kernels take bfloat16.
    """
    lengths = [0, 1, 12, SIZES["max_sequence_length"] - 1, 3]
    if name == "flexmdm":
        config: LLaDAConfig = FlexMDMConfig(**SIZES)
        objective: FlexMDMObjective | MDMObjective = FlexMDMObjective(config, seed=0)  # type: ignore[arg-type]
    else:
        config = LLaDAConfig(**SIZES)
        objective = MDMObjective(config, seed=0, window=SIZES["max_sequence_length"])
    model = model_for(config)
    examples = objective.prepare(documents(lengths), ORDINALS, TIMES)
    model.model.attention = backend
    bf16, backward, device = False, True, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        install(monkeypatch)
        monkeypatch.setattr(llada, "choose_backend", lambda asked, *_: asked)
        backward = backend != "flex"
    else:
        bf16 = backend in ("varlen", "flash")
        if obstacle(backend, device, torch.bfloat16 if bf16 else torch.float32, 8) is not None:
            pytest.skip("not to be had on this GPU")
        model.to(device)

    def run(bins: list[list[int]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model.zero_grad()
        losses = []
        for rows in bins:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16), torch.set_grad_enabled(backward):
                terms = objective.loss_terms(model, examples.micro_batch(rows).to(device))
            losses.append(torch.stack(list(terms.values())))
            if backward:
                losses[-1].sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert len(gradients) == (len(list(model.parameters())) if backward else 0)
        return [torch.cat(losses, 1).detach()], gradients

    packed, alone, with_empty = run([[0, 1, 2, 3, 4]]), run([[i] for i in range(5)]), run([[], [0, 1, 2, 3, 4], []])
    assert packed[0][0].shape == (2 if name == "flexmdm" else 1, 5)
    for together, apart, between in zip(packed, alone, with_empty, strict=True):
        assert all(map(torch.equal, together, between))
        if together:
            difference = norm([x - y for x, y in zip(together, apart, strict=True)]) / norm(together)
            print(f"measured: {difference:.1e}")
            assert difference < (2e-2 if bf16 else 1e-6)
        for one, two in zip(together, apart, strict=True) if not bf16 else ():
            assert (one - two).abs().max() <= 1e-5 * one.abs().max() + 1e-7


def test_packed_training_loss_equals_the_dense_loss() -> None:
    config = FlexMDMConfig(**SIZES)
    model, objective, batch = model_for(config), FlexMDMObjective(config, seed=3), documents(LENGTHS)
    terms = objective.loss_terms(model, objective.prepare(batch, ORDINALS, TIMES).micro_batch(range(5)))
    corrupted = corrupt(
        batch.tokens, batch.lengths, TIMES, kept=batch.kept, open_gaps=batch.open_gaps, schedules=config.schedules,
        mask_token_id=38, pad_token_id=39, key=(3, ORDINALS),
    )  # fmt: skip
    mask = torch.arange(30) < corrupted.lengths[:, None]
    out = model(corrupted.tokens, mask, TIMES, kept=corrupted.kept, open_gaps=corrupted.open_gaps)
    dense = flexmdm_loss(out.logits, out.expected_gaps, corrupted, TIMES, schedules=config.schedules)
    assert torch.allclose(terms["unmasking"], dense.unmasking, rtol=1e-5)
    assert torch.allclose(terms["insertion"], dense.insertion, rtol=1e-5)


def test_the_weight_of_t_is_a_factor_of_both_terms() -> None:
    """A density of two bins: t below .5 has mass .8, and so the weight .5 / .8."""
    times = TimeDensity.of_masses(torch.tensor([0, 0.5, 1.0]).double(), torch.tensor([0.8, 0.2]).double())
    config = FlexMDMConfig(**SIZES)
    uniform, objective = FlexMDMObjective(config, 0), FlexMDMObjective(config, 0, times)
    model, batch = model_for(config), documents(LENGTHS)
    weighted = objective.prepare(batch, ORDINALS, torch.where(TIMES < 0.5, 1.6 * TIMES, 0.8 + 0.4 * (TIMES - 0.5)))
    found = objective.loss_terms(model, weighted.micro_batch(range(5)))
    plain = uniform.loss_terms(model, uniform.prepare(batch, ORDINALS, TIMES).micro_batch(range(5)))
    assert all(term.any() for term in plain.values())
    for key, term in plain.items():
        torch.testing.assert_close(found[key], term * torch.where(TIMES < 0.5, 0.625, 2.5))


@pytest.mark.parametrize("kind", ["full", "tied", "lora"])
def test_gradients_of_a_model_are_those_of_the_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Chunks of three rows and one call of the head; for LoRA, with dropout, against PEFT's own sum of the products."""
    config = FlexMDMConfig(**SIZES, weight_tying=kind == "tied")
    model, objective = model_for(config), FlexMDMObjective(config, seed=3)
    if kind == "lora":
        inject(model, AdapterSettings(3, 6.0, 0.3, ("q_proj", HEAD)))
        select_trainable(model)
        torch.nn.init.normal_(model.get_submodule(HEAD).lora_B["default"].weight)
    calls = []
    if kind != "tied":
        model.get_submodule(HEAD).register_forward_hook(lambda *_: calls.append(1))
    batch = objective.prepare(documents(LENGTHS), ORDINALS, TIMES).micro_batch(range(5))

    def run() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(7)
        model.train().zero_grad()
        terms = objective.loss_terms(model, batch)
        torch.stack([term.sum() for term in terms.values()]).sum().backward()
        return terms["unmasking"].detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 3 * 4 * 40)
    loss, gradients = run()
    assert len(calls) == (kind != "tied") and batch.targets.numel() > 6
    monkeypatch.setattr(
        losses, "cross_entropy", lambda logits, targets, **_: F.cross_entropy(logits, targets, reduction="none")
    )
    for _, layer in lora_layers(model):
        layer.lora_variant.clear()
    expected_loss, expected = run()
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == expected.keys() and len(gradients) > 10
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).norm() <= 2e-6 * expected[name].norm() + 1e-7, name


def test_micro_batches_pack_survivors_and_one_slot_each() -> None:
    objective = FlexMDMObjective(FlexMDMConfig(**SIZES), seed=0)
    examples = objective.prepare(documents(LENGTHS), ORDINALS, TIMES)
    batch = examples.micro_batch([2, 0])
    assert batch.packed.lengths.tolist() == examples.lengths[[2, 0]].tolist()
    assert batch.num_tokens == examples.lengths[[2, 0]].sum()
    assert batch.ordinals.tolist() == [15, 4]
    assert (batch.packed.tokens[batch.packed.last_rows] == 39).all()
    assert (batch.packed.tokens[batch.mask_rows] == 38).all() and batch.targets.numel() == batch.mask_rows.numel()
    assert not batch.packed.kept[batch.packed.last_rows].any()
    assert torch.equal(batch.open_gaps, ~batch.packed.closed)


@pytest.mark.parametrize("name", ["flexmdm", "importance", "mdm"])
def test_rows_are_counted_without_drawing_the_examples(name: str) -> None:
    config, batch = FlexMDMConfig(**SIZES), documents(LENGTHS)
    times = importance_density(config.schedules) if name == "importance" else UNIFORM
    objective = MDMObjective(config, 0, window=32) if name == "mdm" else FlexMDMObjective(config, 0, times)
    inside = torch.arange(batch.kept.shape[1]) < batch.lengths[:, None]
    for u in (TIMES, 1 - TIMES):
        counted = objective.count_rows(batch.kept[inside], batch.lengths, ORDINALS, u)
        assert torch.equal(counted, objective.prepare(batch, ORDINALS, u).lengths)


def test_the_mdm_fills_the_window_with_eos_and_weighs_by_the_mask_probability() -> None:
    objective = MDMObjective(LLaDAConfig(**SIZES), seed=0, window=32)
    many = 3000
    batch = documents([10] * many)
    t = torch.full((many,), 0.3, dtype=torch.float64)
    examples = objective.prepare(batch, torch.arange(many), t)
    pack = examples.micro_batch(range(many))
    tokens = pack.packed.tokens.view(many, 32)
    assert (tokens[:, :2] == batch.tokens[:, :2]).all()
    masked = tokens == 38
    assert masked[:, 2:].double().mean() == pytest.approx(0.3007, abs=0.005)  # (1 - eps) t + eps
    assert ((tokens[:, 10:] == 39) | masked[:, 10:]).all()

    class Uniform(torch.nn.Module):
        def forward(self, packed: object, logit_rows: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(logit_rows.numel(), 40))

    loss = objective.loss_terms(Uniform(), pack)["unmasking"]
    # In expectation every one of the 30 tokens that are not kept is paid for once, whatever t.
    assert loss.mean() == pytest.approx(30 * torch.tensor(40.0).log().item(), rel=0.01)


def test_a_document_longer_than_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="30 tokens does not fit a window of 16"):
        MDMObjective(LLaDAConfig(**SIZES), seed=0, window=16).prepare(documents(LENGTHS), ORDINALS, TIMES)
