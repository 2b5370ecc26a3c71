import json
import random
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

from retrofit.checkpoints.adapters import AdapterSettings, inject, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig, LLaDAForMaskedDiffusion, llada
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


# --------------------------------------------------------------------------------------- checkpointing and compilation

CHECKPOINTING: dict[str, dict[str, Any]] = {
    "every block": {}, "every second": {"every_n_layers": 2}, "selective": {"selective": True},
}  # fmt: skip
BATCHES = [[31, 0, 5], [7, 7], [], [0], [0, 0], [12], [1, 2, 40]]
"""Lengths, without slots: ragged, rectangular, no sequence, one row, sequences of one row, one sequence."""


def trainee(*, lora: bool) -> FlexMDMForMaskedDiffusion:
    """Four blocks, everything drawn; LoRA with dropout over frozen weights, or all weights trained."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 32, "n_layers": 4, "n_heads": 4, "mlp_hidden_size": 48}
    ids: dict[str, Any] = {"mask_token_id": 38, "pad_token_id": 39, "eos_token_id": 39}
    model = FlexMDMForMaskedDiffusion(FlexMDMConfig(**sizes, **ids, max_sequence_length=64, time_group_size=2))
    if lora:
        inject(model, AdapterSettings(2, 4.0, 0.3, ("q_proj", "v_proj", "ff_proj")))
        select_trainable(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def train_on(model: FlexMDMForMaskedDiffusion, lengths: list[int], *, bf16: bool = False) -> list[torch.Tensor]:
    """Outputs of a batch and the gradients of a loss, with dropout as seeded."""
    torch.manual_seed(1)
    packed = pack([torch.randint(39, (length,)).tolist() for length in lengths], slot=39)
    packed = replace(packed, kept=packed.tokens % 2 == 0)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(packed=packed, timesteps=torch.rand(len(lengths)))
    (out.logits.float().square().sum() + out.expected_gaps.sum()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == sum(p.requires_grad for p in model.parameters())
    return [x.detach().clone() for x in (out.logits, out.expected_gaps, *gradients)]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Norm of the difference of all tensors together, relative."""
    ours, right = (torch.cat([x.flatten() for x in tensors]) for tensors in (found, expected))
    return float((ours - right).norm() / right.norm().clamp(min=1e-30))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_gradient_checkpointing_changes_not_a_bit(mode: str, lora: bool, bf16: bool) -> None:
    model = trainee(lora=lora)
    plain = [train_on(model, lengths, bf16=bf16) for lengths in BATCHES]
    model.gradient_checkpointing_enable(**CHECKPOINTING[mode])
    for lengths, expected in zip(BATCHES, plain, strict=True):
        assert all(map(torch.equal, train_on(model, lengths, bf16=bf16), expected))


class Calls(TorchDispatchMode):
    """Counts calls of operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_recomputed_is_what_was_asked_for() -> None:
    """Of four blocks, each with one silu, one attention, and seven matrix products of which the last is not needed."""
    attention = "aten._scaled_dot_product_flash_attention_for_cpu.default"

    def count(**settings: Any) -> tuple[int, int, int]:
        model = trainee(lora=False)
        if settings:
            model.gradient_checkpointing_enable(**settings)
        with Calls() as calls:
            train_on(model, [9, 3])
        return calls.counts["aten.silu.default"], calls.counts[attention], calls.counts["aten.mm.default"]

    silus, attentions, products = count()
    assert (silus, attentions) == (4 + 1, 4)  # one silu is the time embedding's
    assert count(every_n_layers=1) == (silus + 4, attentions + 4, products + 4 * 6)
    assert count(every_n_layers=2) == (silus + 2, attentions + 2, products + 2 * 6)
    assert count(every_n_layers=3) == (silus + 2, attentions + 2, products + 2 * 6)  # blocks 0 and 3
    assert count(selective=True) == (silus + 4, attentions, products)


def test_gradient_checkpointing_is_switched_as_transformers_does_it() -> None:
    model = trainee(lora=False)
    flags = lambda: [block.gradient_checkpointing for block in model.model.blocks]  # noqa: E731
    model.activation_checkpointing_enable(every_n_layers=2)
    assert flags() == [True, False, True, False] and model.is_activation_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"preserve_rng_state": False})
    assert flags() == [True] * 4
    assert model.model.blocks[0]._gradient_checkpointing_func.keywords == {
        "use_reentrant": False, "preserve_rng_state": False,
    }  # fmt: skip
    model.gradient_checkpointing_disable()
    assert flags() == [False] * 4 and not model.is_activation_checkpointing
    with pytest.raises(ValueError, match="offload is not supported"):
        model.activation_checkpointing_enable(offload=True)


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """The graphs that blocks are compiled to, by a backend that generates no code; none is broken up."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found: list[Any] = []
    yield found
    assert not torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()


def compile_counting(model: FlexMDMForMaskedDiffusion, graphs: list[Any]) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    model.compile_blocks(backend)


def many_lengths() -> list[list[int]]:
    """Batches of all forms. The first has as many rows as the model is wide, and as many sequences as each has rows."""
    draw = random.Random(0)
    return [[3] * 8, [3] * 4, *BATCHES, *([draw.randint(0, 60) for _ in range(draw.randint(1, 9))] for _ in range(20))]


def test_blocks_of_every_batch_are_one_graph(graphs: list[Any]) -> None:
    """With dropout and selective checkpointing in it."""
    model = trainee(lora=True)
    plain = [train_on(model, lengths) for lengths in many_lengths()]
    model.gradient_checkpointing_enable(selective=True)
    compile_counting(model, graphs)
    for lengths, expected in zip(many_lengths(), plain, strict=True):
        assert difference(train_on(model, lengths), expected) < 1e-6
    assert len(graphs) == 1
    model.eval()
    with torch.no_grad():
        for lengths in many_lengths():
            model(packed=pack([[1] * length for length in lengths], slot=39), timesteps=torch.rand(len(lengths)))
    assert len(graphs) == 2  # and one without gradients


def test_a_frozen_embedding_and_skipped_blocks_make_graphs_of_their_own(
    graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most there are: block 0, whose input needs no gradient; blocks that are recomputed; and those that are not.

    By the variable-length kernel, for which a stand-in computes under a mask made of the same arguments.
    """

    def varlen_attn(q: Any, k: Any, v: Any, ends: Any, _: Any, longest: int, __: int, **settings: Any) -> torch.Tensor:
        assert longest == 256
        ids = torch.bucketize(torch.arange(q.shape[0]), ends, right=True)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, ids[:, None] == ids)[0].transpose(0, 1)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    monkeypatch.setattr(llada, "choose_backend", lambda asked, *_: asked.replace("auto", "padded"))
    model = load("llada_tiny")
    inject(model, AdapterSettings(2, 4.0, 0.0, ("q_proj",)))
    select_trainable(model.train())
    model.gradient_checkpointing_enable(every_n_layers=2)

    def gradients(lengths: list[int]) -> list[torch.Tensor]:
        model.zero_grad()
        rows = [[380 if i % 3 else 382 - i % 2 for i in range(length)] for length in lengths]
        model(packed=pack(rows)).logits.square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    plain = [gradients(lengths) for lengths in many_lengths()]
    model.model.attention = "varlen"
    compile_counting(model, graphs)
    for lengths, expected in zip(many_lengths(), plain, strict=True):
        assert difference(gradients(lengths), expected) < 1e-5  # measured: 2e-6
    assert len(graphs) == 3


def test_compiled_code_computes_the_same(graphs: list[Any]) -> None:
    model = trainee(lora=False)
    batches = [[31, 0, 5], [12], [7, 7]]
    plain = [train_on(model, lengths) for lengths in batches]
    model.compile_blocks()
    for lengths, expected in zip(batches, plain, strict=True):
        assert difference(train_on(model, lengths), expected) < 1e-6
