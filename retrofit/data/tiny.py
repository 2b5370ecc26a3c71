"""`retrofit init`: a small LLaDA with random weights and its tokenizer, in the layout of the released checkpoints.

The tokenizer's tokens are the 256 bytes, ids equal to the byte's value, and LLaDA's special tokens after them. So any
text makes tokens and comes back byte for byte, and every piece of text makes the same tokens wherever it stands.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

SPECIAL_TOKENS = {
    "<|startoftext|>": 256,
    "<|endoftext|>": 257,
    "<|mdm_mask|>": 258,
    "<|start_header_id|>": 259,
    "<|end_header_id|>": 260,
    "<|eot_id|>": 261,
}
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# LLaDA's own chat form, for those who call `apply_chat_template`; equal to `retrofit.data.templates.chat_prompt`.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def init(
    dest: Path,
    *,
    layers: int = 4,
    d_model: int = 128,
    heads: int = 4,
    kv_heads: int | None = None,
    mlp_hidden: int = 384,
    vocab_size: int = 264,
    max_sequence_length: int = 1024,
    tied: bool = False,
    seed: int = 0,
) -> None:
    """Write a randomly drawn LLaDA to `dest`: config.json, model.safetensors, tokenizer.json, tokenizer_config.json.

    Args:
        dest: a directory that does not exist or is empty; it appears when it is complete.
        layers, d_model, heads, kv_heads, mlp_hidden: the shape; `kv_heads` None means as many as `heads`.
        vocab_size: rows of the embedding, at least the tokenizer's 262.
        max_sequence_length: in tokens.
        tied: whether the embedding is the LM head too.
        seed: of the weights, drawn as LLaDA's are: normal with standard deviation .02, norms 1.

    Raises ValueError for a `dest` that holds something or a shape that does not fit together.
    """
    import torch
    from safetensors.torch import save_file

    from retrofit.flexmdm import LLaDAConfig, LLaDAForMaskedDiffusion

    dest = Path(dest)
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise ValueError(f"{dest} exists and is not an empty directory: choose another destination")
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"--vocab-size {vocab_size}: the tokenizer alone has {SMALLEST_VOCABULARY} tokens")
    config = released_config(
        n_layers=layers,
        d_model=d_model,
        n_heads=heads,
        n_kv_heads=heads if kv_heads is None else kv_heads,
        mlp_hidden_size=mlp_hidden,
        vocab_size=vocab_size,
        embedding_size=vocab_size,
        max_sequence_length=max_sequence_length,
        weight_tying=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LLaDAForMaskedDiffusion(LLaDAConfig(**config))
    temporary = dest.parent / f".{dest.name}.writing-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        weights = {name: tensor.float().contiguous() for name, tensor in model.state_dict().items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        byte_tokenizer().save_pretrained(temporary)
        os.rename(temporary, dest)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(tensor.numel() for tensor in weights.values())
    print(f"written   {dest}: a LLaDA of {size:,} parameters, randomly drawn, and a byte tokenizer")


def byte_tokenizer() -> Any:
    """The toy tokenizer, with LLaDA's special tokens and chat form."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        mask_token="<|mdm_mask|>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def released_config(**fields: Any) -> dict[str, Any]:
    """config.json of the released LLaDA checkpoints, every field of it, with `fields` in place of LLaDA-8B's."""
    released = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": 4096,
        "embedding_dropout": 0.0,
        "embedding_size": 126464,
        "eos_token_id": SPECIAL_TOKENS["<|endoftext|>"],
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": SPECIAL_TOKENS["<|mdm_mask|>"],
        "max_sequence_length": 4096,
        "mlp_hidden_size": 12288,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": 32,
        "n_kv_heads": 32,
        "n_layers": 32,
        "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": 126464,
        "weight_tying": False,
    }
    return released | fields


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level tokenizers (GPT-2's table): bytes that print
    stand for themselves, the others for characters from U+0100 on, in order."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]
