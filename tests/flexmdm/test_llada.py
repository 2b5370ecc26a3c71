import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.flexmdm import LLaDAConfig, LLaDAForMaskedDiffusion
from retrofit.flexmdm.packing import pack

GOLDEN = Path(__file__).parent.parent / "golden"
ILLADA = {
    "vocab_size": 155136,
    "n_kv_heads": 8,
    "mlp_hidden_size": 14336,
    "max_sequence_length": 8192,
    "weight_tying": True,
    "mask_token_id": 5,
}


def load(name: str) -> LLaDAForMaskedDiffusion:
    return LLaDAForMaskedDiffusion.from_pretrained(GOLDEN / name, dtype=torch.float32)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found - expected).abs().max() / expected.abs().max()).detach())


@pytest.mark.parametrize("name", ["llada_tiny", "illada_tiny"])
def test_logits_and_hidden_states_equal_the_published_code(name: str) -> None:
    model, expected = load(name), load_file(GOLDEN / name / "expected.safetensors")
    for case in range(3):
        out = model(expected[f"case{case}.input_ids"])
        assert relative(out.logits, expected[f"case{case}.logits"]) < 1e-5
        assert relative(out.last_hidden_state, expected[f"case{case}.last_hidden_state"]) < 1e-5


@pytest.mark.parametrize("name", ["llada_tiny", "illada_tiny"])
def test_packed_equals_dense_equals_one_at_a_time(name: str) -> None:
    model = load(name)
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(300, (n,), generator=generator).tolist() for n in (0, 1, 13, 40, 1)]
    packed = pack(sequences)
    together = model(packed=packed, logit_rows=torch.arange(packed.tokens.numel())).logits
    longest = max(len(s) for s in sequences)
    dense_ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
    dense = model(dense_ids, mask).logits
    alone = [model(torch.tensor([s])).logits[0] for s in sequences if s]
    assert relative(dense[mask.bool()], together) < 1e-5
    assert relative(torch.cat(alone), together) < 1e-5
    assert not dense[~mask.bool()].any()


def test_logits_are_computed_at_the_asked_rows_only() -> None:
    model = load("llada_tiny")
    packed = pack([[1, 382, 3], [382]])
    every = model(packed=packed, logit_rows=torch.arange(4)).logits
    assert relative(model(packed=packed).logits, every[[1, 3]]) < 1e-6
    assert model(packed=packed, logit_rows=torch.tensor([], dtype=torch.long)).logits.shape == (0, 384)


def test_the_8b_model_has_the_released_tensors() -> None:
    with torch.device("meta"):
        model = LLaDAForMaskedDiffusion(LLaDAConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    d, mlp, vocab = 4096, 12288, 126464
    released = {
        "model.transformer.wte.weight": (vocab, d),
        "model.transformer.ln_f.weight": (d,),
        "model.transformer.ff_out.weight": (vocab, d),
    }
    block = {"attn_norm": (d,), "ff_norm": (d,), "ff_proj": (mlp, d), "up_proj": (mlp, d), "ff_out": (d, mlp)}
    block |= dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (d, d))
    for i in range(32):
        released |= {f"model.transformer.blocks.{i}.{name}.weight": shape for name, shape in block.items()}
    assert shapes == released and len(shapes) == 291
    assert sum(p.numel() for p in model.parameters()) == 8_015_581_184


def test_illada_has_grouped_heads_and_no_head_tensor() -> None:
    with torch.device("meta"):
        model = LLaDAForMaskedDiffusion(LLaDAConfig(**ILLADA, pad_token_id=2, eos_token_id=2))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert "model.transformer.ff_out.weight" not in shapes
    assert shapes["model.transformer.blocks.0.k_proj.weight"] == (1024, 4096)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("alibi", True, "`alibi` is True"),
        ("include_bias", True, "`include_bias`"),
        ("layer_norm_type", "default", "`layer_norm_type`"),
        ("block_type", "sequential", "`block_type`"),
        ("activation_type", "swiglu", "`activation_type`"),
        ("scale_logits", True, "`scale_logits`"),
        ("residual_dropout", 0.1, "`residual_dropout`"),
        ("rope", False, "`rope`"),
        ("embedding_size", 512, "`embedding_size`"),
        ("mask_token_id", 384, "`mask_token_id` 384 is not a row"),
        ("n_heads", 5, "`n_heads`"),
        ("n_kv_heads", 3, "`n_kv_heads`"),
        ("d_model", "64", "`d_model` must be a positive integer"),
        ("rope_thet", 1e4, "`rope_thet` is not known.*`rope_theta`"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(field: str, value: object, message: str) -> None:
    released = json.loads((GOLDEN / "llada_tiny" / "config.json").read_text())
    LLaDAConfig.from_dict(dict(released))
    with pytest.raises(ValueError, match=message):
        LLaDAConfig.from_dict({**released, field: value})


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llada_tiny", tmp_path / "model"))


def shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[:10], "model-00002-of-00002.safetensors": names[10:]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in halves.items() for name in part}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "model.safetensors").unlink()


def test_a_sharded_directory_loads_like_a_single_file(copy: Path) -> None:
    shard(copy)
    loaded = LLaDAForMaskedDiffusion.from_pretrained(copy, dtype=torch.float32).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in load("llada_tiny").state_dict().items())


def test_a_missing_shard_is_named(copy: Path) -> None:
    shard(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing"):
        LLaDAForMaskedDiffusion.from_pretrained(copy)


def test_an_adapter_is_told_from_a_whole_model(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "adapter").mkdir()
    (copy / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a LoRA adapter"):
        LLaDAForMaskedDiffusion.from_pretrained(copy)


def test_no_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="neither model.safetensors nor"):
        LLaDAForMaskedDiffusion.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.transformer.ln_f.weight"), "1 missing tensors.*ln_f"),
        (lambda t: t.update(extra=torch.zeros(2)), "1 surplus tensors.*extra"),
        (lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(63)}), "1 misshapen tensors.*ln_f"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(copy: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        LLaDAForMaskedDiffusion.from_pretrained(copy)


def test_saving_keeps_names_and_bytes(tmp_path: Path) -> None:
    for name in ("llada_tiny", "illada_tiny"):
        load(name).save_pretrained(tmp_path / name)
        saved, released = (load_file(path / "model.safetensors") for path in (tmp_path / name, GOLDEN / name))
        assert saved.keys() == released.keys()
        assert all(torch.equal(saved[key], released[key]) for key in saved)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["max_sequence_length"] == 256 and "auto_map" not in config


def test_gradient_checkpointing_changes_no_gradient() -> None:
    model = load("llada_tiny").train()
    packed = pack([[1, 2, 382, 4], [382, 3]])
    model(packed=packed).logits.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(packed=packed).logits.square().mean().backward()
    assert all(torch.equal(plain[name], p.grad) for name, p in model.named_parameters())
