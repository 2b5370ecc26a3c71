from dataclasses import replace

import pytest
import torch

from retrofit.flexmdm.packing import lengths_from_mask, pack


def test_positions_restart_in_each_sequence() -> None:
    packed = pack([[5, 6, 7], [], [8]])
    assert packed.tokens.tolist() == [5, 6, 7, 8]
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4] and packed.cu_seqlens.dtype == torch.int32
    assert packed.positions.tolist() == [0, 1, 2, 0]
    assert packed.sequence_ids.tolist() == [0, 0, 0, 2]


def test_every_sequence_ends_with_its_slot() -> None:
    packed = pack([[5, 6], [], [8]], slot=0)
    assert packed.tokens.tolist() == [5, 6, 0, 0, 8, 0]
    assert packed.last_rows.tolist() == [2, 3, 5]


def test_no_sequences_and_no_rows_are_batches_too() -> None:
    for packed in (pack([]), pack([[], []])):
        assert packed.positions.shape == packed.sequence_ids.shape == (0,)
        assert packed.without_empty.num_sequences == 0


@pytest.mark.parametrize("lengths", [[3, 3], [1, 4, 0, 2], [1], [0, 5]])
def test_without_empty_sequences_the_rows_are_the_same(lengths: list[int]) -> None:
    packed = pack([list(range(length)) for length in lengths])
    found = packed.without_empty
    assert found.lengths.tolist() == list(found.host_lengths) == [length for length in lengths if length]
    assert torch.equal(found.tokens, packed.tokens) and torch.equal(found.positions, packed.positions)


def test_the_host_knows_the_lengths_of_a_batch_that_has_moved() -> None:
    packed = pack([[5, 6, 7], [], [8]], slot=0)
    assert packed.host_lengths == (4, 1, 2)
    assert packed.to("meta").host_lengths == (4, 1, 2)
    assert replace(packed, tokens=packed.tokens + 1).host_lengths == (4, 1, 2)


def test_padding_inside_a_row_is_refused() -> None:
    assert lengths_from_mask(torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="on the right"):
        lengths_from_mask(torch.tensor([[0, 1, 1]]))
