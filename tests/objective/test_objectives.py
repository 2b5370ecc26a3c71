"""Packed batches of both objectives against documents computed one at a time, and against the dense loss."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, lora_layers, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig, LLaDAForMaskedDiffusion
from retrofit.objective import FlexMDMObjective, MDMObjective, corrupt, cross_entropy, flexmdm_loss, losses

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


@pytest.mark.parametrize("name", ["flexmdm", "mdm"])
def test_loss_and_gradient_of_a_pack_are_sums_over_documents(name: str) -> None:
    if name == "flexmdm":
        config: LLaDAConfig = FlexMDMConfig(**SIZES)
        objective: FlexMDMObjective | MDMObjective = FlexMDMObjective(config, seed=0)  # type: ignore[arg-type]
    else:
        config = LLaDAConfig(**SIZES)
        objective = MDMObjective(config, seed=0, window=32)
    model = model_for(config)
    examples = objective.prepare(documents(LENGTHS), ORDINALS, TIMES)

    def run(bins: list[list[int]]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        model.zero_grad()
        terms: dict[str, list[torch.Tensor]] = {}
        for rows in bins:
            found = objective.loss_terms(model, examples.micro_batch(rows))
            torch.stack([term.sum() for term in found.values()]).sum().backward()
            for key, value in found.items():
                terms.setdefault(key, []).append(value.detach())
        return {k: torch.cat(v) for k, v in terms.items()}, [p.grad.clone() for p in model.parameters()]

    packed, gradient = run([[0, 1, 2, 3, 4]])
    alone, gradient_alone = run([[i] for i in range(5)])
    with_empty, gradient_empty = run([[], [0, 1, 2, 3, 4], []])
    for key in packed:
        assert torch.allclose(packed[key], alone[key], rtol=1e-5, atol=1e-6)
        assert torch.equal(packed[key], with_empty[key])
    for one, two, three in zip(gradient, gradient_alone, gradient_empty, strict=True):
        assert (one - two).abs().max() <= 1e-5 * one.abs().max() + 1e-7
        assert torch.equal(one, three)


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
