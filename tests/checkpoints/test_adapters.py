from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.checkpoints import adapters, loading
from retrofit.checkpoints.adapters import HEAD, AdapterSettings
from retrofit.flexmdm import FlexMDMForMaskedDiffusion, LLaDAConfig, LLaDAForMaskedDiffusion
from tests.saves import save_adapter

TARGETS = ("q_proj", "v_proj", HEAD)


def adapted(toy: Path, targets: tuple[str, ...] = TARGETS, dropout: float = 0.0) -> FlexMDMForMaskedDiffusion:
    """A retrofitted toy with random factors and random new modules, so that nothing is zero."""
    torch.manual_seed(0)
    model: FlexMDMForMaskedDiffusion = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model")
    adapters.inject(model, AdapterSettings(4, 8.0, dropout, targets))
    adapters.select_trainable(model)
    with torch.no_grad():
        for name in adapters.adapter_names(model):
            parameter = model.get_parameter(name)
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def save(model: FlexMDMForMaskedDiffusion, directory: Path, toy: Path, targets: tuple[str, ...] = TARGETS) -> None:
    weights = {name: model.get_parameter(name) for name in adapters.adapter_names(model)}
    settings = AdapterSettings(4, 8.0, 0.0, targets)
    save_adapter(directory, weights, settings, base_model=str(toy / "model"), base_revision=None)
    model.config.save_pretrained(directory)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    ids = torch.tensor([[97, 98, 258, 100], [258, 98, 99, 257]])
    out = model(
        input_ids=ids,
        attention_mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        timesteps=torch.tensor([0.3, 0.7], dtype=torch.float64),
        kept=torch.tensor([[True, False, False, False]] * 2),
    )
    return torch.cat((out.logits.flatten(), out.expected_gaps.flatten())).detach()


def test_only_factors_and_new_modules_are_trained_and_in_float32(toy: Path) -> None:
    model = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model", dtype=torch.bfloat16)
    adapters.inject(model, AdapterSettings(4, 8.0, 0.1, TARGETS))
    adapters.select_trainable(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == sorted(adapters.adapter_names(model))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert sum("lora_A" in name for name in trained) == 2 * 2 + 1


def test_a_bare_ff_out_is_the_blocks_and_a_full_path_the_head(toy: Path) -> None:
    model = LLaDAForMaskedDiffusion.from_pretrained(toy / "model")
    blocks = [f"model.transformer.blocks.{i}.ff_out" for i in range(2)]
    assert adapters.find_targets(model, ["ff_out"]) == blocks
    assert adapters.find_targets(model, [HEAD]) == [HEAD]
    assert adapters.find_targets(model, ["ff_out", HEAD]) == [*blocks, HEAD]
    adapters.inject(model, AdapterSettings(2, 2.0, 0.0, ("ff_out",)))
    assert [name for name, _ in adapters.lora_layers(model)] == blocks


@pytest.mark.parametrize(
    ("target", "nearest"),
    [("o_proj", "attn_out"), ("gate_proj", "ff_proj"), ("down_proj", "ff_out"), ("lm_head", HEAD), ("q_poj", "q_proj")],
)
def test_a_target_that_matches_nothing_is_refused_with_the_nearest(toy: Path, target: str, nearest: str) -> None:
    model = LLaDAForMaskedDiffusion.from_pretrained(toy / "model")
    with pytest.raises(ValueError, match=f"{target} matches no module of the model; nearest: {nearest}$"):
        adapters.inject(model, AdapterSettings(4, 4.0, 0.0, ("q_proj", target)))
    assert not adapters.is_adapted(model)


def test_a_tied_head_takes_no_factors() -> None:
    sizes = {
        "vocab_size": 16,
        "d_model": 8,
        "n_layers": 1,
        "n_heads": 2,
        "mlp_hidden_size": 8,
        "max_sequence_length": 8,
    }
    ids = {"mask_token_id": 1, "pad_token_id": 2, "eos_token_id": 2}
    model = LLaDAForMaskedDiffusion(LLaDAConfig(**sizes, **ids, weight_tying=True))
    with pytest.raises(ValueError, match="tied to the embedding"):
        adapters.inject(model, AdapterSettings(4, 4.0, 0.0, (HEAD,)))


@pytest.mark.parametrize("targets", [TARGETS, ("k_proj", "ff_out"), ("ff_out", HEAD)])
def test_plain_peft_loads_the_directory_with_equal_outputs(toy: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    from peft import PeftModel

    model = adapted(toy, targets)
    save(model, tmp_path, toy, targets)
    base = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model")
    plain = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    assert torch.equal(outputs(plain), outputs(model))


def test_merging_gives_the_same_outputs_and_the_released_names(toy: Path) -> None:
    model = adapted(toy)
    before = outputs(model)
    adapters.merge_into_base(model)
    untouched = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model")
    assert list(model.state_dict()) == list(untouched.state_dict()) and not adapters.is_adapted(model)
    assert torch.allclose(outputs(model), before, atol=1e-5)
    adapters.inject(model, AdapterSettings(2, 2.0, 0.0, ("q_proj",)))  # a merged model can be adapted again
    assert len(list(adapters.lora_layers(model))) == 2


def test_merging_into_bfloat16_rounds_once(toy: Path) -> None:
    model = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model", dtype=torch.bfloat16)
    adapters.inject(model, AdapterSettings(4, 8.0, 0.0, ("q_proj",)))
    adapters.select_trainable(model)
    _, layer = next(adapters.lora_layers(model))
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = (layer.base_layer.weight.float() + 2.0 * b @ a).to(torch.bfloat16)
    adapters.merge_into_base(model)
    assert torch.equal(model.model.transformer["blocks"][0].q_proj.weight, expected)


def test_an_adapter_that_does_not_fit_is_refused_with_count_and_names(toy: Path, tmp_path: Path) -> None:
    model = adapted(toy)
    save(model, tmp_path, toy)
    file = tmp_path / adapters.WEIGHTS_FILE
    good = load_file(file)
    key = "base_model.model.model.transformer.blocks.0.q_proj.lora_B.weight"

    save_file({("x." + k if k == key else k): v for k, v in good.items()}, file)
    with pytest.raises(ValueError, match=r"1 unmatched keys \(x\.base.*1 missing keys \(base_model.*q_proj.lora_B"):
        adapters.adapter_readers(model, tmp_path)
    save_file({k: v for k, v in good.items() if k != key}, file)
    with pytest.raises(ValueError, match=r"does not fit its base: 1 missing keys"):
        adapters.adapter_readers(model, tmp_path)
    save_file({**good, key: good[key][:1].clone()}, file)
    with pytest.raises(ValueError, match="1 misshapen keys"):
        adapters.adapter_readers(model, tmp_path)
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        adapters.adapter_readers(model, tmp_path)


def test_features_of_peft_that_are_not_supported_are_refused(toy: Path, tmp_path: Path) -> None:
    save(adapted(toy), tmp_path, toy)
    path = tmp_path / adapters.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora is set"):
        adapters.read_adapter_config(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_s_product_is_peft_s_and_makes_no_other_tensor_of_its_size(toy: Path, dtype: torch.dtype) -> None:
    model = FlexMDMForMaskedDiffusion.from_pretrained(toy / "model", dtype=dtype)
    adapters.inject(model, AdapterSettings(4, 8.0, 0.3, (HEAD,)))
    adapters.select_trainable(model)
    layer = model.get_submodule(HEAD).train()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    hidden = torch.randn(7, 32, dtype=dtype)
    scale = torch.randn(7, layer.out_features).to(dtype)

    def run() -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(5)
        layer.zero_grad()
        leaf = hidden.clone().requires_grad_()
        with Wide(layer.out_features) as wide, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = layer(leaf)
        assert logits.dtype == dtype
        logits.backward(scale)
        factors = [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
        return [logits.detach(), leaf.grad, *factors], wide.made

    ours, made = run()
    layer.lora_variant.clear()
    theirs, made_by_peft = run()
    assert (made, made_by_peft) == (1, 4)
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == two.dtype
        assert (one - two).norm() <= (1e-6 if dtype == torch.float32 else 8e-3) * two.norm()


def test_what_plain_peft_saved_is_loaded_with_its_patterns_and_saved_alike(toy: Path, tmp_path: Path) -> None:
    """A PEFT model of the base with ranks and alphas of its own in some layers, against the same outputs from ours."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(3)
    base = LLaDAForMaskedDiffusion.from_pretrained(toy / "model")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"],
        rank_pattern={"blocks.1.q_proj": 2}, alpha_pattern={"v_proj": 3},
    )  # fmt: skip
    theirs = get_peft_model(base, config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "peft")
    saved = json.loads((tmp_path / "peft" / adapters.CONFIG_FILE).read_text())
    (tmp_path / "peft" / adapters.CONFIG_FILE).write_text(
        json.dumps({**saved, "base_model_name_or_path": str(toy / "model")})
    )
    tokens = torch.tensor([[5, 258, 7, 258]])
    with torch.no_grad():
        expected = theirs.eval()(tokens).logits
        ours = loading.load_source(loading.resolve(tmp_path / "peft"))
        torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    layers = dict(adapters.lora_layers(ours))
    assert layers["model.transformer.blocks.1.q_proj"].lora_A["default"].weight.shape[0] == 2
    assert layers["model.transformer.blocks.0.v_proj"].scaling["default"] == 3 / 4

    settings, _, _ = adapters.read_adapter_config(tmp_path / "peft")
    weights = {name: ours.get_parameter(name) for name in adapters.adapter_names(ours)}
    save_adapter(tmp_path / "again", weights, settings, base_model=str(toy / "model"), base_revision=None)
    again = PeftModel.from_pretrained(LLaDAForMaskedDiffusion.from_pretrained(toy / "model"), tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(tokens).logits, expected, rtol=1e-5, atol=1e-5)
    assert (settings.difference(AdapterSettings(4, 8.0, 0.0, ("q_proj", "v_proj"))) or "").startswith("rank_pattern")


def test_peft_merges_and_unmerges_a_live_model(toy: Path) -> None:
    model = adapted(toy)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(tokens, timesteps=torch.tensor([0.5])).logits
        for _, layer in adapters.lora_layers(model):
            layer.merge(safe_merge=layer.out_features % 64 == 0)
        merged = model(tokens, timesteps=torch.tensor([0.5])).logits
        assert all(layer.merged for _, layer in adapters.lora_layers(model))
        for _, layer in adapters.lora_layers(model):
            layer.unmerge()
        after = model(tokens, timesteps=torch.tensor([0.5])).logits
    for found in (merged, after):
        torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-5)


class Wide(TorchDispatchMode):
    """Counts the matrices of so many columns that operations make."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.made = columns, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_new = isinstance(result, torch.Tensor) and all(result is not arg for arg in args)
        self.made += is_new and result.shape == (7, self.columns)
        return result
