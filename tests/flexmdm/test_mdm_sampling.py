from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.flexmdm import LLaDAConfig, PackedSequences
from retrofit.flexmdm.mdm_sampling import sample_mdm
from retrofit.flexmdm.sampling import Sample

PAD = 11
CONFIG = {
    "vocab_size": 12,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "mlp_hidden_size": 16,
    "max_sequence_length": 32,
    "mask_token_id": 10,
    "pad_token_id": PAD,
    "eos_token_id": PAD,
}


class Copyist:
    """An MDM that is surest of the right answer at its end, and says token (position mod 5)."""

    def __init__(self) -> None:
        self.config = LLaDAConfig(**CONFIG)
        self.rows: list[list[int]] = []

    def __call__(self, packed: PackedSequences, logit_rows: torch.Tensor) -> SimpleNamespace:
        position = packed.positions[logit_rows]
        self.rows.append(position.tolist())
        logits = torch.zeros(logit_rows.numel(), 12)
        logits[torch.arange(len(position)), position % 5] = 3.0 + position.float()
        logits[position == 9] = 0.0
        logits[position == 9, PAD] = 2.0
        return SimpleNamespace(logits=logits)


def test_the_mdm_sampler_commits_the_surest_tokens_block_by_block() -> None:
    model = Copyist()
    samples = sample_mdm(model, [[0, 1], [0, 1]], answer_length=8, steps=4, block_length=4)
    assert samples[0] == Sample([0, 1, 2, 3, 4, 0, 1, 2, 3], [True] * 2 + [False] * 7, 4, False)  # cut at EOS
    # Two of four masks of a block are committed at each of its two steps, the surest (the last) first.
    assert [row[: len(row) // 2] for row in model.rows] == [[2, 3, 4, 5], [2, 3], [6, 7, 8, 9], [6, 9]]


def test_the_mdm_sampler_takes_prompts_of_unequal_length() -> None:
    samples = sample_mdm(Copyist(), [[], [0], [0, 1, 2]], answer_length=4, steps=4)
    assert [s.token_ids for s in samples] == [[0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_length": 7, "block_length": 4}, "multiple of block_length"),
        ({"answer_length": 8, "block_length": 4, "steps": 3}, "number of blocks"),
        ({"answer_length": 40}, "exceed the model"),
        ({"answer_length": 0}, "answer_length must be at least 1"),
        ({"answer_length": 4, "temperature": -1.0}, "temperature"),
        ({"answer_length": 4, "temperature": float("inf")}, "temperature"),
    ],
)
def test_the_mdm_sampler_refuses_what_does_not_divide(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_mdm(Copyist(), [[1]], **{"steps": 4, **settings})
