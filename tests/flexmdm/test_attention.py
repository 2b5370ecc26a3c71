"""Every back-end against one reference (`tests.kernels`); kernels that need a GPU by stand-ins where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import DynamicOutputShapeException, FakeTensorMode

from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion
from retrofit.flexmdm.attention import (
    BACKENDS,
    alike,
    attention,
    choose_backend,
    document_mask,
    padding,
    plan_attention,
)
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths, pack
from tests.kernels import install, reference

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return install(monkeypatch)


def packed_rows(lengths: list[int]) -> PackedSequences:
    return PackedSequences(torch.zeros(sum(lengths), dtype=torch.long), cumulative_lengths(torch.tensor(lengths)))


def draw(packed: PackedSequences, kv_heads: int, dtype: torch.dtype, head_size: int) -> tuple[Tensor, ...]:
    """q, k, v and weights for a sum over the output, on the batch's device."""
    torch.manual_seed(0)
    rows = packed.tokens.numel()
    heads = (4, kv_heads, kv_heads, 4)
    drawn = [torch.randn(rows, count, head_size).to(packed.tokens.device, dtype) for count in heads]
    return *(x.requires_grad_() for x in drawn[:3]), drawn[3]


def with_gradients(compute: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> list[Tensor]:
    """The output, and the gradients of q, k and v of its weighted sum."""
    out = compute(q, k, v)
    return [out.detach(), *torch.autograd.grad((out * weights.to(out.dtype)).sum(), (q, k, v))]


LENGTHS = [[7], [5, 5, 5], [1, 9, 0, 4], [0, 1], [0, 0, 3, 0], [1, 1], [130, 200, 1, 60]]
"""Ragged, rectangular, empty and single rows; the last crosses flex attention's blocks of 128."""


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("backend", ["padded", "varlen", "flash"])
def test_values_and_gradients_are_the_references(
    kernels: list[dict[str, Any]], backend: str, lengths: list[int], kv_heads: int, uniform: bool
) -> None:
    """`uniform`: laid out as for compiled blocks. In float32, so that padding and packing can be seen to be exact."""
    packed = packed_rows(lengths)
    inputs = draw(packed, kv_heads, FP32, 8)
    plan = plan_attention(packed, backend, bound=512 if uniform else None)
    found = with_gradients(partial(attention, plan=plan), *inputs)
    expected = with_gradients(partial(reference, ends=packed.cu_seqlens.tolist()), *inputs)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == FP32 and (ours - right).abs().max() < 2e-6
    assert len(kernels) == (0 if backend == "padded" else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("backend", "dtype"), [(b, t) for b in BACKENDS for t in (BF16, torch.float16, FP32)])
def test_values_and_gradients_are_the_references_on_a_gpu(backend: str, dtype: torch.dtype) -> None:
    """To three times the error of plain attention in the same dtype."""
    try:
        choose_backend(backend, CUDA, dtype, 64)
    except ValueError as error:
        pytest.skip(str(error))
    for lengths, kv_heads in product(LENGTHS, (4, 2, 1)):
        packed = packed_rows(lengths).to(CUDA)
        inputs = draw(packed, kv_heads, dtype, 64)
        plan, ends = plan_attention(packed, backend), packed.cu_seqlens.tolist()
        found = with_gradients(partial(attention, plan=plan), *inputs)
        usual = with_gradients(partial(plain, ends=ends), *inputs)
        expected = with_gradients(partial(reference, ends=ends), *inputs)
        for ours, theirs, right in zip(found, usual, expected, strict=True):
            slack = torch.finfo(dtype).eps * right.abs().max()
            assert (ours - right).abs().max() <= 3 * (theirs - right).abs().max() + slack


def plain(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
    """The reference in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    parts = [slice(begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]
    scores = [torch.einsum("qhd,khd->hqk", q[rows], k[rows]) / q.shape[-1] ** 0.5 for rows in parts]
    outs = [torch.einsum("hqk,khd->qhd", s.softmax(-1), v[rows]) for s, rows in zip(scores, parts, strict=True)]
    return torch.cat(outs)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("lengths", [*LENGTHS, [128, 128], [300], [64, 64, 256]])
def test_flex_attention_is_the_reference_forward(lengths: list[int], kv_heads: int) -> None:
    """Uncompiled, which has no backward on a CPU."""
    packed = packed_rows(lengths)
    plan = plan_attention(packed, "flex")
    q, k, v = (x.detach() for x in draw(packed, kv_heads, FP32, 16)[:3])
    out = attention(q, k, v, plan)
    assert (out - reference(q, k, v, packed.cu_seqlens.tolist())).abs().max() < 2e-6


@pytest.mark.parametrize("lengths", [[7], [130, 200, 1, 60], [128, 128], [300], [64, 64, 256], [1] * 300, [600, 5]])
def test_the_document_mask_is_the_one_torch_makes_of_all_pairs(lengths: list[int]) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    packed = packed_rows(lengths)
    ids, rows = packed.sequence_ids, sum(lengths)
    ours = document_mask(packed)
    torchs = create_block_mask(lambda b, h, i, j: ids[i] == ids[j], None, None, rows, rows, device="cpu")
    assert torch.equal(ours.to_dense(), torchs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name))
    for count, name in ((ours.kv_num_blocks, "kv_indices"), (ours.full_kv_num_blocks, "full_kv_indices")):
        valid = torch.arange(getattr(ours, name).shape[-1]) < count[..., None]
        assert torch.equal(getattr(ours, name)[valid], getattr(torchs, name)[valid])


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_over_no_rows_still_reaches_all_inputs(backend: str) -> None:
    for packed in (pack([]), pack([[], []])):
        q, k, v = (torch.zeros(0, heads, 4, requires_grad=True) for heads in (2, 1, 1))
        out = attention(q, k, v, plan_attention(packed, backend, bound=8))
        assert out.shape == (0, 2, 4)
        out.sum().backward()
        assert all(x.grad is not None for x in (q, k, v))


def test_kernels_are_told_a_bound_that_no_length_changes(kernels: list[dict[str, Any]]) -> None:
    def longest(lengths: list[int], bound: int | None) -> Any:
        packed = packed_rows(lengths)
        q, k, v, _ = draw(packed, 2, BF16, 8)
        attention(q, k, v, plan_attention(packed, "varlen", bound=bound))
        return kernels[-1]["max_q"]

    assert [longest([3, 5], 64), longest([9], 64)] == [64, 64]
    assert longest([3, 5], None) == 5
    assert longest([70], 64) == 70  # what a kernel is not told of it leaves out


def test_laid_out_for_compiled_blocks_every_batch_has_the_same_form() -> None:
    for lengths in ([7], [1, 1], [5, 5, 5], [3, 9]):
        plan: Any = plan_attention(packed_rows(lengths), "padded", bound=16)
        (block,) = plan.blocks
        assert block.mask is not None and min(block.mask.shape) >= 2 and block.mask.any(-1).all()


def test_neighbours_of_like_length_share_a_block_and_others_do_not() -> None:
    assert alike([400, 399, 398, 12, 11, 1, 300]) == [[400, 399], [398], [12, 11, 1], [300]]
    assert alike([10] * 500) == [[10] * 500]
    plan: Any = plan_attention(packed_rows([400, 399, 12, 0, 11]), "padded")
    assert [(block.count, block.size, block.rows) for block in plan.blocks] == [(2, 400, 799), (2, 12, 23)]
    for lengths, uniform, rows in (([400, 399, 12, 0, 11], False, 2), ([9, 4, 0, 2], True, 12), ([0], False, 0)):
        assert padding(packed_rows(lengths), "padded", uniform=uniform) == rows
    assert padding(packed_rows([9, 4]), "varlen", uniform=False) == 0


# -------------------------------------------------------------------------------------------------------------- choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that there is a GPU of a capability, and that flash-attn is installed or not."""
    from importlib import util

    def pretend(capability: tuple[int, int] = (9, 0), flash: bool = False) -> None:
        find = util.find_spec
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
        monkeypatch.setattr(util, "find_spec", lambda name: flash or None if name == "flash_attn" else find(name))

    return pretend


def test_the_automatic_choice_is_the_best_that_can_be_had(gpu: Callable[..., None]) -> None:
    gpu()
    assert choose_backend("auto", CPU, BF16, 64) == choose_backend("auto", torch.device("meta"), BF16, 64) == "padded"
    assert choose_backend("auto", CUDA, BF16, 64) == choose_backend("auto", CUDA, torch.float16, 256) == "varlen"
    assert choose_backend("auto", CUDA, FP32, 64) == "padded"
    assert choose_backend("auto", CUDA, BF16, 36) == choose_backend("auto", CUDA, BF16, 264) == "padded"
    gpu(capability=(7, 5), flash=True)
    assert choose_backend("auto", CUDA, BF16, 64) == "padded"


def test_an_older_torch_falls_back_to_flash_attn(gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import varlen

    from retrofit.flexmdm import attention as module

    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k: None)
    monkeypatch.setattr(module, "_torch_has_varlen", module._torch_has_varlen.__wrapped__)
    gpu(flash=True)
    assert choose_backend("auto", CUDA, BF16, 64) == "flash"
    gpu(flash=False)
    assert choose_backend("auto", CUDA, BF16, 64) == "padded"
    with pytest.raises(ValueError, match="varlen needs a newer torch than"):
        choose_backend("varlen", CUDA, BF16, 64)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_size", "why"),
    [
        ("varlen", CPU, BF16, 64, "needs a CUDA device, and this one is cpu"),
        ("flash", CPU, BF16, 64, "needs a CUDA device, and this one is cpu"),
        ("flex", CPU, FP32, 64, "needs a CUDA device, and this one is cpu"),
        ("varlen", CUDA, FP32, 64, r"computes in half precision \(training.bf16: true\), not in float32"),
        ("varlen", CUDA, BF16, 36, "takes head sizes that are multiples of 8 up to 256, not 36"),
        ("flash", CUDA, BF16, 64, "needs the package flash-attn, which is not installed"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    gpu: Callable[..., None], backend: str, device: torch.device, dtype: torch.dtype, head_size: int, why: str
) -> None:
    gpu()
    with pytest.raises(ValueError, match=f"^attention: {backend} {why}; mend that, or choose auto$"):
        choose_backend(backend, device, dtype, head_size)


def test_an_old_gpu_is_named(gpu: Callable[..., None]) -> None:
    gpu(capability=(7, 5))
    with pytest.raises(ValueError, match=r"varlen needs a GPU of compute capability 8.0, and some GPU is older"):
        choose_backend("varlen", CUDA, BF16, 64)


# ----------------------------------------------------------------------------------------------------- nothing is asked


@pytest.fixture
def fake() -> Iterator[Callable[[list[int]], PackedSequences]]:
    """Batches of fake tensors, which hold nothing: whatever would make the host wait for a GPU raises."""
    with FakeTensorMode():

        def make(lengths: list[int]) -> PackedSequences:
            tokens, ends = torch.zeros(sum(lengths), dtype=torch.long), torch.zeros(len(lengths) + 1, dtype=torch.int32)
            return PackedSequences(tokens, ends, tokens.bool(), host_lengths=tuple(lengths))

        yield make


@pytest.mark.parametrize("lengths", [[3, 5, 1], [4, 4], []])
def test_a_forward_and_backward_ask_nothing_of_the_device(
    fake: Callable[[list[int]], PackedSequences], lengths: list[int]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 64}
    ids: dict[str, Any] = {"mask_token_id": 38, "pad_token_id": 39, "eos_token_id": 39}
    model = FlexMDMForMaskedDiffusion(FlexMDMConfig(**sizes, **ids)).train()
    rows = torch.zeros(min(2, sum(lengths)), dtype=torch.long)
    out = model(packed=fake(lengths), timesteps=torch.zeros(len(lengths)), logit_rows=rows)
    (out.logits.sum() + out.expected_gaps.sum()).backward()
    with pytest.raises(DynamicOutputShapeException):  # so the fake does notice
        model(packed=fake(lengths), timesteps=torch.zeros(len(lengths)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[3, 5, 1], [0, 4, 4]])
def test_a_plan_asks_nothing_of_the_device(
    fake: Callable[[list[int]], PackedSequences], backend: str, lengths: list[int]
) -> None:
    assert plan_attention(fake(lengths), backend) is not None
