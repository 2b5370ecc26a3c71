import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAForMaskedDiffusion, PackedSequences
from retrofit.flexmdm.modeling import NEW_MODULES, add_slots
from retrofit.flexmdm.packing import pack
from retrofit.objective.losses import insertion_sums

GOLDEN = Path(__file__).parent.parent / "golden"
SMALL = {
    "vocab_size": 40,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "mlp_hidden_size": 64,
    "max_sequence_length": 64,
    "mask_token_id": 38,
    "pad_token_id": 39,
    "eos_token_id": 39,
    "time_group_size": 2,
    "mean_deletable_tokens": 10.0,
}


def random_model(**fields: object) -> FlexMDMForMaskedDiffusion:
    """A model whose zero-initialised parts are drawn too, so that everything has an effect."""
    torch.manual_seed(0)
    model = FlexMDMForMaskedDiffusion(FlexMDMConfig(**{**SMALL, **fields}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("name", ["llada_tiny", "illada_tiny"])
def test_a_plain_llada_loads_and_gives_its_own_logits(name: str) -> None:
    """At the start a retrofitted model is LLaDA run on the tokens and the end slot."""
    llada = LLaDAForMaskedDiffusion.from_pretrained(GOLDEN / name, dtype=torch.float32)
    flexmdm = FlexMDMForMaskedDiffusion.from_pretrained(
        GOLDEN / name, dtype=torch.float32, flexmdm_config={"mean_deletable_tokens": 20.0}
    )
    ids = load_file(GOLDEN / name / "expected.safetensors")["case1.input_ids"]
    with_slot = torch.cat((ids, torch.full((2, 1), llada.config.pad_token_id)), 1)
    t = torch.tensor([0.3, 0.9])
    kept = torch.rand(ids.shape) < 0.5
    out = flexmdm(ids, timesteps=t, kept=kept)
    assert torch.equal(out.logits, llada(with_slot).logits[:, :-1])
    # The head starts at the best function of alpha alone, softly bounded by the longest sequence.
    start = (1 - t) * 20 / (20 * t + 1)
    assert torch.allclose(out.expected_gaps, start[:, None].expand(2, 18), rtol=1e-3)


def test_fresh_modules_depend_on_the_seed_and_start_as_designed() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = FlexMDMForMaskedDiffusion.from_pretrained(GOLDEN / "llada_tiny", dtype=torch.float32)
        return {k: v for k, v in model.state_dict().items() if k.split(".")[0] in NEW_MODULES}

    first, again, other = draw(0), draw(0), draw(1)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)
    zero = {k for k in first if not first[k].any()}
    assert {k for k in zero if k.endswith("weight")} == {
        "time_conditioning.modulations.0.weight",
        "flag_embedding.weight",
        "insertion_head.output.weight",
    }
    assert first["time_conditioning.hidden.weight"].std() == pytest.approx(0.02, rel=0.1)


def test_random_weights_equal_the_published_wrapper() -> None:
    """The softplus form on raw t, from the published code's own tensors (LoRA merged here by hand)."""
    folder = GOLDEN / "flexmdm_reference"
    config = json.loads((folder / "config.json").read_text())
    lora, group = config.pop("lora"), config.pop("time_group_size")
    for name in ("model_type", "architectures"):
        config.pop(name)
    model = FlexMDMForMaskedDiffusion(
        FlexMDMConfig(
            **config,
            time_group_size=group,
            time_input="t",
            time_scale=1.0,
            insertion_head_form="softplus",
            max_gap=1024,
            token_flags=False,
        )
    )
    published = load_file(folder / "state_dict.safetensors")
    renamed = {
        "scalar_length_head.norm": "insertion_head.norm",
        "scalar_length_head.proj1": "insertion_head.hidden",
        "scalar_length_head.proj2": "insertion_head.output",
        "time_mlp.0": "time_conditioning.hidden",
        "time_mlp.2": "time_conditioning.output",
    }
    tensors = {}
    for key, tensor in published.items():
        if "lora_" in key:
            continue
        if key.endswith("base_layer.weight"):
            stem = key.removesuffix("base_layer.weight")
            b, a = (published[f"{stem}lora_{x}.default.weight"] for x in "BA")
            tensor = tensor + lora["alpha"] / lora["r"] * b @ a
        key = key.removeprefix("backbone.base_model.model.").replace(".base_layer", "")
        if match := re.fullmatch(r"model\.transformer\.blocks\.(\d+)\.temb_mod\.(\w+)", key):
            key = f"time_conditioning.modulations.{int(match[1]) // group}.{match[2]}"
        for old, new in renamed.items():
            key = key.replace(old, new)
        tensors[key] = tensor
    model.load_state_dict(tensors, strict=True)
    expected = load_file(folder / "expected.safetensors")
    for case in range(3):
        out = model(expected[f"case{case}.xt"], timesteps=expected[f"case{case}.t"])
        assert relative(out.logits, expected[f"case{case}.token_logits"]) < 1e-5
        assert relative(out.expected_gaps, expected[f"case{case}.expected_gaps"]) < 1e-5


@pytest.mark.parametrize("flags", [True, False])
def test_packed_equals_dense_equals_one_at_a_time(flags: bool) -> None:
    model = random_model()
    lengths = torch.tensor([0, 1, 9, 20, 1])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(37, (5, 20), generator=generator)
    ids[torch.rand(5, 20, generator=generator) < 0.3] = SMALL["mask_token_id"]
    mask = torch.arange(20) < lengths[:, None]
    t = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    extra = {}
    if flags:
        extra = {
            "kept": (torch.rand(5, 20, generator=generator) < 0.3) & (ids != SMALL["mask_token_id"]),
            "open_gaps": torch.rand(5, 21, generator=generator) < 0.5,
        }
    dense = model(ids, mask, t, **extra)
    packed = model(packed=add_slots(ids, lengths, SMALL["pad_token_id"], **extra), timesteps=t)
    gap_mask = torch.arange(21) <= lengths[:, None]
    assert relative(packed.logits, dense.logits[mask & (ids == SMALL["mask_token_id"])]) < 1e-5
    assert relative(packed.expected_gaps, dense.expected_gaps[gap_mask]) < 1e-5
    assert not dense.expected_gaps[~gap_mask].any()
    for b, n in enumerate(lengths.tolist()):
        one = {name: value[b : b + 1, : n + (name == "open_gaps")] for name, value in extra.items()}
        alone = model(ids[b : b + 1, :n], None, t[b : b + 1], **one)
        assert relative(alone.expected_gaps[0], dense.expected_gaps[b, : n + 1]) < 1e-5
        if n:
            assert relative(alone.logits[0], dense.logits[b, :n]) < 1e-5


def test_each_document_has_its_own_time() -> None:
    """The AdaLN of a neighbour in the row must not reach a document."""
    model = random_model()
    packed = pack([[1, 38, 2], [3, 38]], slot=39)
    first = model(packed=packed, timesteps=torch.tensor([0.2, 0.9]))
    second = model(packed=packed, timesteps=torch.tensor([0.2, 0.1]))
    assert torch.equal(first.expected_gaps[:4], second.expected_gaps[:4])
    assert relative(first.expected_gaps[4:], second.expected_gaps[4:]) > 1e-2


def test_the_flags_reach_the_prediction_and_absent_flags_add_nothing() -> None:
    model = random_model()
    packed = pack([[1, 38, 2]], slot=39)
    none = torch.zeros(4, dtype=torch.bool)
    t = torch.tensor([0.4])

    def gaps(kept: torch.Tensor | None, closed: torch.Tensor | None) -> torch.Tensor:
        return model(packed=PackedSequences(packed.tokens, packed.cu_seqlens, kept, closed), timesteps=t).expected_gaps

    assert torch.equal(gaps(None, None), gaps(none, none))
    one = torch.tensor([True, False, False, False])
    assert relative(gaps(one, none), gaps(none, none)) > 1e-3
    assert relative(gaps(none, one), gaps(none, none)) > 1e-3
    assert torch.equal(gaps(one, None), gaps(one, none)) and torch.equal(gaps(None, one), gaps(none, one))


def test_fed_alpha_the_model_depends_on_t_through_alpha_alone() -> None:
    packed = pack([[1, 38, 2]], slot=39)
    linear = random_model()
    power = random_model(insertion_schedule={"type": "power", "exponent": 2.0})
    t = torch.tensor([0.75])
    same_alpha = torch.tensor([0.5])  # 1 - (1 - .5)^2 = .75
    assert torch.allclose(
        linear(packed=packed, timesteps=t).expected_gaps, power(packed=packed, timesteps=same_alpha).expected_gaps
    )
    raw = random_model(time_input="t", insertion_schedule={"type": "power", "exponent": 2.0})
    assert not torch.allclose(
        linear(packed=packed, timesteps=t).logits, raw(packed=packed, timesteps=same_alpha).logits
    )


def test_time_is_resolved_near_the_end() -> None:
    """Neighbouring alphas near 1 are told apart, under bfloat16 autocast too."""
    model = random_model()
    times = model.config.time_scale * torch.tensor([0.990, 0.991])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scale = model.time_conditioning(times)[0][0]
    assert relative(scale[0], scale[1]) > 1e-2


def test_an_expected_gap_is_bounded_smoothly() -> None:
    model = random_model()
    head = model.insertion_head
    with torch.no_grad():
        head.output.bias.fill_(100.0)
    hidden = torch.randn(5, 32)
    out = head(hidden, torch.zeros(5))
    assert (out <= 64).all() and torch.allclose(out, torch.full((5,), 64.0))
    with torch.no_grad():
        head.output.bias.fill_(math.log(64.0))
        head.output.weight.zero_()
    out = head(hidden, torch.zeros(5))
    (grad,) = torch.autograd.grad(out.log().sum(), head.output.bias)
    assert grad == pytest.approx(2.5)  # half of the unbounded gradient, at the bound itself


def test_zero_rows_reach_every_parameter() -> None:
    """A rank with nothing to train on still gives every parameter a gradient (of zero)."""
    model = random_model().train()
    none = torch.zeros(0, dtype=torch.bool)
    packed = PackedSequences(torch.zeros(0, dtype=torch.long), torch.zeros(1, dtype=torch.int32), none, none)
    out = model(packed=packed, timesteps=torch.zeros(0))
    assert out.logits.shape == (0, 40) and out.expected_gaps.shape == (0,)
    (out.logits.sum() + out.expected_gaps.sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = random_model().train()
    packed = pack([[1, 38, 2], [], [38]], slot=39)
    t = torch.tensor([0.1, 0.5, 0.8])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out = model(packed=packed, timesteps=t)
        (out.logits.square().mean() + out.expected_gaps.sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.gradient_checkpointing_enable()
    for grad, expected in zip(gradients(), plain, strict=True):
        assert torch.equal(grad, expected)


def test_saving_and_loading_keeps_everything(tmp_path: Path) -> None:
    model = random_model(insertion_schedule={"type": "geometric", "sigma_min": 0.01, "sigma_max": 10.0}, alpha_end=0.98)
    model.save_pretrained(tmp_path)
    loaded = FlexMDMForMaskedDiffusion.from_pretrained(tmp_path)
    assert loaded.config.schedules == model.config.schedules
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "flexmdm" and config["max_sequence_length"] == 64 and "auto_map" not in config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("insertion_head.hidden.weight"), "1 missing tensors.*insertion_head.hidden"),
        (lambda t: t.update(stray=torch.zeros(1)), "1 surplus tensors.*stray"),
        (lambda t: t.update({"insertion_head.hidden.weight": torch.zeros(3, 3)}), "misshapen.*insertion_head"),
    ],
)
def test_new_modules_are_never_drawn_for_a_flexmdm(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    random_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        FlexMDMForMaskedDiffusion.from_pretrained(tmp_path)


def test_a_llada_with_some_of_the_new_tensors_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "model"))
    tensors = load_file(path / "model.safetensors") | {"insertion_head.norm.weight": torch.ones(64)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="surplus tensors.*insertion_head.norm.weight"):
        FlexMDMForMaskedDiffusion.from_pretrained(path)


def test_another_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type 'llama'"):
        FlexMDMForMaskedDiffusion.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_input", "beta"),
        ("insertion_head_form", "relu"),
        ("unmasking_schedule", {"type": "cubic"}),
        ("alpha_end", 1.5),
        ("mean_deletable_tokens", 0),
        ("time_embedding_size", 31),
        ("banned_token_ids", [40]),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        FlexMDMConfig(**{**SMALL, field: value})


def test_the_8b_retrofit_stays_small() -> None:
    """Time conditioning, flags and head of LLaDA-8B: 285,290,497 parameters, 3.6 % of the model."""
    with torch.device("meta"):
        model = FlexMDMForMaskedDiffusion(FlexMDMConfig())
    new = sum(p.numel() for name, p in model.named_parameters() if name.split(".")[0] in NEW_MODULES)
    mlp = 4096 * 16384 * 2 + 16384 + 4096
    adaln = 4 * (4096 * 8192 + 8192)
    head = 2 * 4096 + 4096 * 4096 + 4096 + 4096 + 1
    assert new == mlp + adaln + head + 2 * 4096 == 285_290_497


def test_no_gradient_is_lost_where_hardly_anything_is_missing() -> None:
    """alpha_end = 1, t next to 1, a head that is sure of empty gaps: the loss's logarithm stays finite."""
    model = random_model(alpha_end=1.0, insertion_schedule={"type": "power", "exponent": 2.9}).train()
    with torch.no_grad():
        model.insertion_head.output.bias.fill_(-200.0)
    packed = pack([[1, 38, 2]], slot=39)
    out = model(packed=packed, timesteps=torch.tensor([1 - 1e-6], dtype=torch.float64))
    every = torch.ones(4, dtype=torch.bool)
    gaps = torch.tensor([0, 1, 0, 0])
    insertion_sums(out.expected_gaps, gaps, every, packed.sequence_ids, torch.ones(1)).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
