"""The toy model and its tokenizer, in the layout of the released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoTokenizer

from retrofit.data.templates import encode
from retrofit.data.tiny import SPECIAL_TOKENS, byte_tokenizer, init
from retrofit.flexmdm import LLaDAForMaskedDiffusion

TOKENIZER = byte_tokenizer()
SMALL: dict[str, Any] = {"layers": 2, "d_model": 16, "heads": 2, "mlp_hidden": 24}


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_comes_back_byte_for_byte(text: str) -> None:
    token_ids = encode(TOKENIZER, text)
    assert token_ids == list(text.encode()) and TOKENIZER.decode(token_ids) == text


@pytest.mark.parametrize("text", ["    indented", " ", "\n\n", "a , b . c 's", "\u200b\ufeff", *SPECIAL_TOKENS])
def test_spaces_marks_and_spelt_special_tokens_survive(text: str) -> None:
    assert TOKENIZER.decode(encode(TOKENIZER, text)) == text


def test_a_saved_tokenizer_loads_with_its_special_tokens(tmp_path: Path) -> None:
    init(tmp_path / "tiny", **SMALL)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny", trust_remote_code=False)
    assert encode(tokenizer, "  é\n") == list("  é\n".encode())
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id)
    assert ids == (256, 257, 257, 258) and len(tokenizer) == 262
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS} == SPECIAL_TOKENS


def test_the_weights_have_the_released_names_and_load(tmp_path: Path) -> None:
    init(tmp_path / "tiny", **SMALL, vocab_size=300, kv_heads=1)
    names = set(load_file(tmp_path / "tiny/model.safetensors"))
    layer = ("attn_norm", "ff_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")
    blocks = {f"model.transformer.blocks.{i}.{name}.weight" for i in range(2) for name in layer}
    assert names == blocks | {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}
    model = LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "tiny")
    assert model(torch.tensor([[1, 2, 258]])).logits.shape == (1, 3, 300)


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    init(tmp_path / "tiny", **SMALL, tied=True)
    assert "model.transformer.ff_out.weight" not in load_file(tmp_path / "tiny/model.safetensors")
    LLaDAForMaskedDiffusion.from_pretrained(tmp_path / "tiny")


def test_the_config_has_every_released_field(tmp_path: Path) -> None:
    init(tmp_path / "tiny", **SMALL)
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    assert len(config) == 45 and config["architectures"] == ["LLaDAModelLM"] and config["mask_token_id"] == 258


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        torch.manual_seed(torch.seed() % 100)
        init(tmp_path / name, **SMALL, seed=seed)
    first, second, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert first == second != other


def test_an_occupied_destination_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    with pytest.raises(ValueError, match="not an empty directory"):
        init(tmp_path / "mine", **SMALL)
    assert [child.name for child in (tmp_path / "mine").iterdir()] == ["file"]


def test_a_shape_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--vocab-size 100"):
        init(tmp_path / "tiny", **SMALL, vocab_size=100)
    with pytest.raises(ValueError, match="n_heads"):
        init(tmp_path / "tiny", **{**SMALL, "heads": 3})
    assert list(tmp_path.iterdir()) == []
