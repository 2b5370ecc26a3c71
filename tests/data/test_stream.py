"""A step is a function of recipe and step alone; ranks, workers and the budget only decide who computes what."""

from collections.abc import Sequence
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader

from retrofit.data.stream import StepStream, balance, document_order, stratified_uniforms
from retrofit.flexmdm import FlexMDMConfig
from retrofit.objective import FlexMDMObjective, MicroBatch
from retrofit.objective.times import importance_density

CONFIG = FlexMDMConfig(
    vocab_size=60, d_model=8, n_layers=1, n_heads=1, mlp_hidden_size=8, max_sequence_length=64,
    mask_token_id=58, pad_token_id=59, eos_token_id=59,
)  # fmt: skip


class Store:
    """Thirty documents of lengths 0 to 29, document d made of token d."""

    def __len__(self) -> int:
        return 30

    def kept(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(int(indices.sum()), dtype=torch.bool), indices

    def documents(self, indices: torch.Tensor) -> SimpleNamespace:
        lengths = indices
        inside = torch.arange(29) < lengths[:, None]
        return SimpleNamespace(
            tokens=lengths[:, None].expand(-1, 29).masked_fill(~inside, 59),
            lengths=lengths,
            kept=torch.zeros_like(inside),
            open_gaps=torch.arange(30) <= lengths[:, None],
        )


def stream(**changes: int) -> StepStream:
    settings = {"seed": 5, "documents_per_step": 12, "time_strata": 12, "max_tokens_per_device": 200, "max_steps": 6}
    return StepStream(Store(), FlexMDMObjective(CONFIG, seed=5), **{**settings, **changes})  # type: ignore[arg-type]


def by_ordinal(batches: list[MicroBatch]) -> dict[int, tuple[list[int], list[int], float]]:
    """ordinal -> tokens, gaps and t of its example."""
    found = {}
    for batch in batches:
        assert batch.gaps is not None
        ends = batch.packed.cu_seqlens.tolist()
        for b, ordinal in enumerate(batch.ordinals.tolist()):
            rows = slice(ends[b], ends[b + 1])
            assert ordinal not in found
            found[ordinal] = (batch.packed.tokens[rows].tolist(), batch.gaps[rows].tolist(), float(batch.timesteps[b]))
    return found


def assert_same_batches(ours: list[MicroBatch], theirs: list[MicroBatch]) -> None:
    """Equal in every bit."""
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        for a, b in ((one, other), (one.packed, other.packed)):
            for name in (field.name for field in fields(a) if field.name != "packed"):
                first, second = getattr(a, name), getattr(b, name)
                assert torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def test_the_examples_of_a_step_do_not_depend_on_ranks_budget_or_accumulation() -> None:
    for step in range(3):
        alone = by_ordinal(stream()[step].micro_batches)
        assert sorted(alone) == list(range(12 * step, 12 * step + 12))
        for changes in ({"world_size": 3}, {"micro_batches": 4}, {"max_tokens_per_device": 40}, {"world_size": 16}):
            shares = [stream(**changes, rank=rank)[step].micro_batches for rank in range(changes.get("world_size", 1))]
            assert len({len(share) for share in shares}) == 1  # as many micro-batches on every rank
            assert by_ordinal([batch for share in shares for batch in share]) == alone


def test_a_step_is_what_cutting_the_corrupted_documents_of_all_ranks_gives() -> None:
    """Ranks corrupt their own documents only; the direct way is to corrupt them all and then to cut."""
    for changes in ({"world_size": 3}, {"world_size": 16}, {"max_tokens_per_device": 40}, {"documents_per_step": 100}):
        own = {**changes, "rank": changes.get("world_size", 1) - 1}
        step = stream(**own)[2]
        everyone = stream(**own)
        examples = everyone.examples(everyone.ordinals(2))
        bins = everyone.cut(examples.lengths.tolist())
        direct = [examples.micro_batch(rows) for rows in bins[own["rank"] :: changes.get("world_size", 1)]]
        assert_same_batches(step.micro_batches, direct)
        assert sum(map(sum, step.rows)) == examples.lengths.sum()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    loader = DataLoader(stream(), batch_size=None, sampler=range(2, 6), num_workers=workers)
    for step, batches in zip(range(2, 6), loader, strict=True):
        assert by_ordinal(batches.micro_batches) == by_ordinal(stream()[step].micro_batches)


def test_no_micro_batch_exceeds_the_budget() -> None:
    for step in range(6):
        for batch in stream(max_tokens_per_device=30)[step].micro_batches:
            assert batch.num_tokens <= 30


def test_every_rank_knows_how_many_rows_each_micro_batch_of_each_rank_has() -> None:
    shares = [stream(max_tokens_per_device=40, world_size=3, rank=rank)[0] for rank in range(3)]
    for rank, share in enumerate(shares):
        assert share.rows == shares[0].rows
        assert [rows[rank] for rows in share.rows] == [batch.num_tokens for batch in share.micro_batches]


def test_a_document_over_the_budget_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="max_tokens_per_device: 3 tokens hold no document of"):
        stream(max_tokens_per_device=3)[0]


def test_each_epoch_is_a_new_permutation_of_all_documents() -> None:
    order = document_order(torch.arange(90), 30, seed=1).view(3, 30)
    assert torch.equal(order.sort(1).values, torch.arange(30).expand(3, 30))
    assert not torch.equal(order[0], order[1])
    assert torch.equal(document_order(torch.tensor([77, 3]), 30, seed=1), order.flatten()[[77, 3]])


def test_uniforms_hold_one_of_each_stratum_in_permuted_order() -> None:
    u = stratified_uniforms(torch.arange(160), 16, seed=2).view(10, 16)
    strata = (u * 16).long()
    assert torch.equal(strata.sort(1).values, torch.arange(16).expand(10, 16))
    assert not (strata == strata[0]).all()
    assert ((u * 16) % 1).mean() == pytest.approx(0.5, abs=0.07)


def test_importance_sampled_times_hold_one_of_each_stratum_of_the_density() -> None:
    density = importance_density(CONFIG.schedules)
    ends, _ = density.draw(torch.arange(13).double() / 12)
    steps = StepStream(
        Store(), FlexMDMObjective(CONFIG, 5, density), seed=5, documents_per_step=12, time_strata=12,  # type: ignore[arg-type]
        max_tokens_per_device=200, max_steps=6,
    )  # fmt: skip
    for step in range(6):
        t = torch.cat([batch.timesteps for batch in steps[step].micro_batches]).sort().values
        assert (ends[:-1] <= t).all() and (t <= ends[1:]).all()


def test_greedy_balance_is_close_to_even() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 1025, (128,), generator=generator).tolist()
    loads = [sum(lengths[i] for i in rows) for rows in balance(lengths, 16)]
    assert max(loads) / (sum(lengths) / 16) < 1.02
    assert sorted(i for rows in balance(lengths, 16) for i in rows) == list(range(128))


def test_micro_batches_of_a_step_are_equally_full() -> None:
    """The last one too: 128 documents of up to 1,024 rows over 2 ranks, which take nine rounds of the budget."""
    lengths = torch.randint(1, 1025, (128,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = stream(max_tokens_per_device=4096, world_size=2).cut(lengths)
    loads = [sum(lengths[i] for i in rows) for rows in bins]
    assert len(loads) == 2 * 9 and max(loads) <= 4096 and min(loads) > 0.97 * max(loads)


def test_a_large_store_has_an_order_too_that_no_one_makes_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retrofit.data.stream._epoch_order", None)
    size = 100_000
    order = document_order(torch.arange(2 * size), size, seed=1).view(2, size)
    assert torch.equal(order.sort(1).values, torch.arange(size).expand(2, size))
    assert (order[0] == order[1]).sum() < 20  # 1 expected


@pytest.mark.parametrize("length", [513, 350, 129])
def test_documents_of_an_unlucky_length_are_cut_at_the_first_try(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two, three or eight of them do not fit one bin of 1,024, though by their sum they nearly would."""
    tries: list[int] = []

    def counted(lengths: Sequence[int], bins: int) -> list[list[int]]:
        tries.append(bins)
        return balance(lengths, bins)

    monkeypatch.setattr("retrofit.data.stream.balance", counted)
    bins = stream(max_tokens_per_device=1024, world_size=2).cut([length] * 840)
    assert tries == [len(bins)] == [840 // (1024 // length)]
