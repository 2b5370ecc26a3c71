from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retrofit.flexmdm import Linear, Schedules
from retrofit.flexmdm.schedules import Geometric, Power, Schedule
from retrofit.objective import corrupt
from retrofit.objective.interpolant import count_survivors

GOLDEN = Path(__file__).parent.parent / "golden" / "interpolant" / "linear.safetensors"
LINEAR = Schedules(Linear(), Linear())
IDS = {"schedules": LINEAR, "mask_token_id": 90, "pad_token_id": 91}


def test_integers_equal_the_published_interpolant() -> None:
    golden = load_file(GOLDEN)
    found = corrupt(
        golden["x1"],
        golden["lengths"],
        golden["t"],
        kept=golden["prompt_mask"].bool(),
        schedules=LINEAR,
        mask_token_id=382,
        pad_token_id=380,
        insertion_time=golden["insertion_time"],
        unmasking_time=golden["unmasking_time"],
    )
    assert torch.equal(found.tokens, golden["xt"])
    assert torch.equal(found.lengths, golden["xt_length"])
    assert torch.equal(found.gaps, golden["gaps"])
    assert torch.equal(found.masked, golden["masked"].bool())
    assert torch.equal(found.targets, golden["targets"])
    assert torch.equal(found.open_gaps, golden["gap_mask"].bool())


def test_one_sequence_by_hand() -> None:
    """Seven tokens at t = .5: kept, deleted, mask, deleted, deleted, clean, deleted."""
    never, now = 0.9, 0.2
    found = corrupt(
        torch.tensor([[10, 11, 12, 13, 14, 15, 16]]),
        torch.tensor([7]),
        torch.tensor([0.5]),
        kept=torch.tensor([[True, False, False, False, False, False, False]]),
        insertion_time=torch.tensor([[never, never, now, never, never, now, never]]),
        unmasking_time=torch.tensor([[1.0, 1.0, 0.7, 1.0, 1.0, 0.5, 1.0]]),
        open_gaps=torch.zeros(1, 8, dtype=torch.bool),
        **IDS,
    )
    assert found.tokens.tolist() == [[10, 90, 15, 91, 91, 91, 91]]
    assert found.lengths.tolist() == [3]
    assert found.gaps.tolist() == [[0, 1, 2, 1, 0, 0, 0, 0]]
    assert found.targets.tolist() == [[-100, 12, -100, -100, -100, -100, -100]]
    assert found.kept.tolist() == [[True, False, False, False, False, False, False]]
    # The gap before the kept token is closed; all others border on a token that can be missing.
    assert found.open_gaps.tolist() == [[False, True, True, True, False, False, False, False]]


def test_kept_tokens_are_never_deleted_or_masked() -> None:
    x1 = torch.arange(60).reshape(3, 20)
    kept = torch.rand(3, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    for t in (0.0, 0.5, 1.0):
        found = corrupt(x1, torch.tensor([20, 20, 20]), torch.full((3,), t), kept=kept, key=(0, torch.arange(3)), **IDS)
        for b in range(3):
            assert found.tokens[b][found.kept[b]].tolist() == x1[b][kept[b]].tolist()


def test_an_empty_hole_is_open_and_a_gap_between_kept_tokens_is_closed() -> None:
    kept = torch.ones(1, 3, dtype=torch.bool)
    open_gaps = torch.tensor([[False, True, False, False]])
    found = corrupt(
        torch.tensor([[1, 2, 3]]), torch.tensor([3]), torch.tensor([0.5]), kept=kept, open_gaps=open_gaps,
        key=(0, torch.tensor([0])), **IDS,
    )  # fmt: skip
    assert found.open_gaps.tolist() == [[False, True, False, False]]
    assert found.gaps.sum() == 0


def test_lengths_zero_and_one() -> None:
    found = corrupt(
        torch.tensor([[7, 91], [7, 91]]), torch.tensor([0, 1]), torch.tensor([0.5, 0.0]), kept=None,
        key=(0, torch.arange(2)), **IDS,
    )  # fmt: skip
    assert found.lengths.tolist() == [0, 0]
    assert found.tokens.tolist() == [[91, 91], [91, 91]]
    assert found.gaps.tolist() == [[0, 0, 0], [1, 0, 0]]
    assert found.open_gaps.tolist() == [[True, False, False]] * 2


def test_noise_depends_on_seed_and_ordinal_alone() -> None:
    x1 = torch.arange(80).reshape(4, 20)
    lengths, t, ordinals = torch.full((4,), 20), torch.full((4,), 0.5), torch.tensor([5, 9, 2, 7])

    def rows(order: list[int], seed: int = 0, cut: int = 20) -> list[list[int]]:
        found = corrupt(
            x1[order, :cut], lengths[order].clamp(max=cut), t[order], kept=None, key=(seed, ordinals[order]), **IDS
        )
        return [row[:n].tolist() for row, n in zip(found.tokens, found.lengths, strict=True)]

    together = rows([0, 1, 2, 3])
    assert rows([3, 1]) == [together[3], together[1]]
    assert rows([0, 1, 2, 3], seed=1) != together
    assert rows([2], cut=10)[0] == together[2][: len(rows([2], cut=10)[0])]


@pytest.mark.parametrize("insertion", [Linear(), Power(1.7), Geometric()], ids=lambda schedule: schedule.type)
def test_survivors_are_counted_as_they_are_drawn(insertion: Schedule) -> None:
    """With kept tokens, empty sequences, and t at both ends, beyond alpha_end too."""
    generator = torch.Generator().manual_seed(0)
    schedules = Schedules(insertion, Linear(), alpha_end=0.9)
    lengths = torch.randint(0, 40, (400,), generator=generator)
    inside = torch.arange(40) < lengths[:, None]
    kept = (torch.rand(400, 40, generator=generator) < 0.2) & inside
    t = torch.rand(400, dtype=torch.float64, generator=generator)
    t[:20], t[20:40] = 0.0, 1.0
    key = (3, torch.arange(1000, 1400))
    drawn = corrupt(
        torch.zeros(400, 40, dtype=torch.int64), lengths, t, kept=kept, schedules=schedules, key=key,
        mask_token_id=90, pad_token_id=91,
    )  # fmt: skip
    assert torch.equal(count_survivors(kept[inside], lengths, t, schedules=schedules, key=key), drawn.lengths)


def test_noise_or_times_must_be_given_and_not_both() -> None:
    x1, lengths, t = torch.zeros(1, 2, dtype=torch.long), torch.tensor([2]), torch.tensor([0.5])
    times = torch.ones(1, 2)
    with pytest.raises(ValueError, match="hitting times or a key"):
        corrupt(x1, lengths, t, kept=None, **IDS)
    with pytest.raises(ValueError, match="hitting times or a key"):
        corrupt(x1, lengths, t, kept=None, insertion_time=times, unmasking_time=times, key=(0, lengths), **IDS)
