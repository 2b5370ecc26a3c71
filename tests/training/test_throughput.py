"""Useful FLOPs against torch's own count of what is executed, and the log's fields against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion
from retrofit.flexmdm.packing import pack
from retrofit.objective import FlexMDMObjective
from retrofit.objective.objectives import MicroBatch
from retrofit.training.throughput import Sums, UsefulFlops, Work

LENGTHS = (40, 24, 1)


def batch_of(lengths: tuple[int, ...]) -> MicroBatch:
    """Sequences of which every other token is a mask."""
    packed = pack([[58 if i % 2 else 3 for i in range(length)] for length in lengths], slot=59)
    rows = (packed.tokens == 58).nonzero().squeeze(-1)
    count, total = len(lengths), packed.tokens.numel()
    return MicroBatch(
        packed,
        timesteps=torch.full((count,), 0.5, dtype=torch.float64),
        weights=torch.ones(count, dtype=torch.float64),
        ordinals=torch.arange(count),
        mask_rows=rows,
        targets=torch.ones_like(rows),
        gaps=torch.ones(total, dtype=torch.int64),
        open_gaps=torch.ones(total, dtype=torch.bool),
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rank", [0, 4])
def test_useful_flops_are_those_that_torch_counts_but_for_attention(rank: int, tied: bool) -> None:
    config = FlexMDMConfig(
        vocab_size=60, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, mlp_hidden_size=48, max_sequence_length=64,
        mask_token_id=58, pad_token_id=59, eos_token_id=59, time_group_size=1, weight_tying=tied,
    )  # fmt: skip
    model = FlexMDMForMaskedDiffusion(config)
    if rank:
        targets = ("q_proj", "v_proj") if tied else ("q_proj", "v_proj", HEAD)
        inject(model, AdapterSettings(rank, 4.0, 0.0, targets))
        select_trainable(model)
    batch = batch_of(LENGTHS)
    # The head's product is added in place, which torch's counter does not know.
    in_place = {torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        terms = FlexMDMObjective(config, seed=0).loss_terms(model, batch)
        torch.stack([term.sum() for term in terms.values()]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "mm" in str(operation))

    parameters = dict(model.named_parameters())
    flops = UsefulFlops(
        config,
        {name: parameter.shape for name, parameter in parameters.items()},
        [name for name, parameter in parameters.items() if parameter.requires_grad],
    )
    work = Work.of(batch)
    assert work == Work(rows=68, masks=32, sequences=3, squares=41**2 + 25**2 + 2**2)
    flops.attention = 0
    # The sinusoid needs no gradient: the formula counts one for the input of every weight.
    unneeded = 2 * parameters["time_conditioning.hidden.weight"].numel() * work.sequences
    assert flops(work) - unneeded == products


def test_attention_counts_two_products_forward_and_four_back() -> None:
    config = FlexMDMConfig(d_model=64, n_layers=3, n_heads=4)
    flops = UsefulFlops(config, {}, [])
    # One sequence of 10 rows: scores and mixing are two products of 10 x 10 x 16 for each of 4 heads.
    assert flops(Work(squares=100)) == 3 * 3 * (2 * 4 * 2 * 10 * 10 * 16)


def test_the_log_says_speed_imbalance_and_share_of_the_peak() -> None:
    sums = Sums(steps=2, documents=8, seconds=3.0, waiting=1.0, rows=108, slots=8, padding=6, balanced=120, flops=4e12)
    found = sums.describe(world_size=2, peak=1e12)
    assert found["documents_per_second"] == 2 and found["tokens_per_second"] == 25
    assert found["tflops_per_second"] == 1 and found["mfu"] == 0.5
    assert found["seconds_per_step"] == 2 and found["tokens_per_step"] == 50 and found["slots_per_step"] == 4
    assert found["padding_per_step"] == 3
    assert found["imbalance"] == pytest.approx(120 / 108)
    assert sums.describe(world_size=2, peak=None)["mfu"] is None
