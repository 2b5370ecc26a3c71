"""What the benchmarks of training share: a toy LLaDA made a FlexMDM, and documents of many lengths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, select_trainable
from retrofit.data.store import Documents
from retrofit.flexmdm import FlexMDMForMaskedDiffusion
from retrofit.flexmdm.configuration import FlexMDMConfig

WINDOW = 1024
VOCABULARY = 8192
_SPECIAL = 8  # the last ids: mask, pad and others that are no text


def toy_config(*, window: int = WINDOW, vocabulary: int = VOCABULARY, layers: int = 4) -> FlexMDMConfig:
    """d 256, four heads, an MLP three times as wide, as LLaDA's; new modules in the paper's proportions."""
    return FlexMDMConfig(
        vocab_size=vocabulary,
        d_model=256,
        n_layers=layers,
        n_heads=4,
        n_kv_heads=4,
        mlp_hidden_size=768,
        max_sequence_length=window + 1,
        mask_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 2,
        time_embedding_size=256,
        time_hidden_size=1024,
        time_group_size=1,
        mean_deletable_tokens=300.0,
    )


def toy_model(
    config: FlexMDMConfig, *, rank: int = 128, dropout: float = 0.1, seed: int = 0
) -> FlexMDMForMaskedDiffusion:
    """A FlexMDM with LoRA where the paper has it, or with all weights trained at rank 0; the same for a seed."""
    torch.manual_seed(seed)
    model = FlexMDMForMaskedDiffusion(config)
    if rank:
        inject(model, AdapterSettings(rank, float(rank), dropout, ("q_proj", "k_proj", "v_proj", HEAD)))
        select_trainable(model)
    return model.train()


def natural_lengths(count: int, *, window: int = WINDOW, seed: int = 0) -> list[int]:
    """Log-normal lengths, median 300, sigma .6, cut to the window."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (300 * (0.6 * noise).exp()).round().long().clamp(1, window).tolist()


def random_documents(lengths: Sequence[int], *, vocabulary: int = VOCABULARY, seed: int = 0) -> list[Tensor]:
    """Documents of these lengths, made of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary - _SPECIAL, (length,), generator=generator) for length in lengths]


def read_texts(path: Path) -> list[str]:
    """GSM8K's rows (question and answer) of a .jsonl file; the paragraphs of any other file, headings left out."""
    lines = path.read_text("utf-8").splitlines()
    if path.suffix == ".jsonl":
        return [" ".join(row.values()) for row in map(json.loads, lines)]
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("=")]


def tokenised(texts: list[str], *, window: int = WINDOW, vocabulary: int = VOCABULARY) -> list[Tensor]:
    """The texts in the tokens of a byte-pair encoding of this vocabulary that is made from them, cut to the window."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary - _SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    return [torch.tensor(encoding.ids[:window]) for encoding in tokenizer.encode_batch(texts) if encoding.ids]


def right_padded(documents: Sequence[Tensor]) -> Documents:
    """A batch in which every token may be deleted and every gap is open."""
    lengths = torch.tensor([len(document) for document in documents])
    tokens = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    gaps = torch.arange(tokens.shape[1] + 1) <= lengths[:, None]
    return Documents(tokens, lengths, torch.zeros_like(tokens, dtype=torch.bool), gaps)
