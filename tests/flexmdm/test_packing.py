import pytest
import torch

from retrofit.flexmdm.attention import attention, plan_attention
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths, lengths_from_mask, pack


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
        assert plan_attention(packed, "padded") is None


def test_padding_inside_a_row_is_refused() -> None:
    assert lengths_from_mask(torch.tensor([[1, 1, 0], [0, 0, 0]])).tolist() == [2, 0]
    with pytest.raises(ValueError, match="on the right"):
        lengths_from_mask(torch.tensor([[0, 1, 1]]))


def reference_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: PackedSequences) -> torch.Tensor:
    """One sequence and one head at a time, softmax written out."""
    out = torch.empty_like(q)
    ends = packed.cu_seqlens.tolist()
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[begin:end, head] @ k[begin:end, group].T / q.shape[-1] ** 0.5
            out[begin:end, head] = scores.softmax(-1) @ v[begin:end, group]
    return out


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [1, 9, 0, 4], [0, 1]])
def test_attention_stays_within_each_sequence(lengths: list[int], kv_heads: int) -> None:
    torch.manual_seed(0)
    total = sum(lengths)
    packed = PackedSequences(torch.zeros(total, dtype=torch.long), cumulative_lengths(torch.tensor(lengths)))
    q = torch.randn(total, 4, 8, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, 8, requires_grad=True) for _ in range(2))
    out, expected = attention(q, k, v, plan_attention(packed, "padded")), reference_attention(q, k, v, packed)
    assert torch.allclose(out, expected, atol=1e-6)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    for grad, reference in zip(grads, torch.autograd.grad((expected * weights).sum(), (q, k, v)), strict=True):
        assert torch.allclose(grad, reference, atol=1e-5)


def test_attention_over_no_rows_still_reaches_all_inputs() -> None:
    q, k, v = (torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3))
    attention(q, k, v, plan_attention(pack([[], []]), "padded")).sum().backward()
    assert all(x.grad is not None for x in (q, k, v))
