"""Bidirectional attention within each sequence of a packed batch, by one of four back-ends.

`plan_attention` lays a batch out once per forward, from what the host knows of it; `attention` computes by the plan in
every block. Nothing here waits for the device.

    padded   a padded block with a mask over the keys, just around the product: any device, any dtype; the CPU's way
    varlen   torch's variable-length kernel (FlashAttention-2)
    flash    the package flash-attn, where it is installed
    flex     flex attention under a block mask of documents, compiled

Shape legend: T rows in all, B sequences that have rows, L longest of them, H query heads, K key/value heads (K divides
H), D head size.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing import PackedSequences

BACKENDS = ("padded", "varlen", "flash", "flex")

# So many scores (pairs of rows) are padded rather than a block more made: a call costs about as much.
_PADDED_SCORES = 1024

_FLEX_BLOCK = 128


class Plan(Protocol):
    """How the rows of one batch attend."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `attention`, for at least one row."""


def attention(q: Tensor, k: Tensor, v: Tensor, plan: Plan | None) -> Tensor:
    """Softmax attention of every row to all rows of its own sequence, scaled by D ** -0.5.

    Args:
        q: [T, H, D].
        k, v: [T, K, D].
        plan: of the batch that the rows belong to (`plan_attention`).

    Returns:
        [T, H, D].
    """
    if plan is None:
        return q + 0 * (k.sum() + v.sum())  # no rows, and still a graph through all three
    return plan.attend(q, k, v)


def plan_attention(packed: PackedSequences, backend: str, *, bound: int | None = None) -> Plan | None:
    """Lays a batch out for a back-end (`choose_backend`); None if it has no rows.

    Args:
        bound: given where blocks are compiled: then all batches are laid out alike, so that one graph serves them, and
            kernels are told this constant as the longest sequence.
    """
    assert backend in BACKENDS, backend
    if packed.tokens.numel() == 0:
        return None
    packed = packed.without_empty  # flash-attention's backward has hung on sequences without rows
    if backend == "padded":
        return PaddedPlan.of(packed, uniform=bound is not None)
    if backend == "flex":
        return FlexPlan(document_mask(packed))
    return KernelPlan(backend, packed.cu_seqlens, max(bound or 0, *packed.host_lengths))


# -------------------------------------------------------------------------------------------------------------- choice


def choose_backend(asked: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The back-end that `asked` stands for.

    "auto" is padded on a CPU, and on a CUDA device the first of varlen, flash and padded that can be had.

    Args:
        dtype: of q, k and v.

    Raises:
        ValueError: the back-end that was asked for cannot compute here, and why.
    """
    if asked == "auto":
        choices = ("varlen", "flash", "padded") if device.type == "cuda" else ("padded",)
        return next(name for name in choices if obstacle(name, device, dtype, head_size) is None)
    problem = obstacle(asked, device, dtype, head_size)
    if problem is not None:
        raise ValueError(f"attention: {asked} {problem}; mend that, or choose auto")
    return asked


def obstacle(backend: str, device: torch.device | None, dtype: torch.dtype, head_size: int) -> str | None:
    """Why a back-end cannot compute, None if it can.

    Args:
        device: None where it is not known: then it is taken for one that will do.
    """
    if backend == "padded":
        return None
    if device is not None and device.type != "cuda":
        return f"needs a CUDA device, and this one is {device.type}"
    if backend == "flex":
        return None
    if dtype not in (torch.bfloat16, torch.float16):
        return f"computes in half precision (training.bf16: true), not in {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > 256:
        return f"takes head sizes that are multiples of 8 up to 256, not {head_size}"
    if device is not None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"needs a GPU of compute capability 8.0, and {torch.cuda.get_device_name(device)} is older"
    if backend == "varlen" and not _torch_has_varlen():
        return f"needs a newer torch than {torch.__version__} (torch.nn.attention.varlen with grouped heads)"
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        return "needs the package flash-attn, which is not installed"
    return None


@cache
def _torch_has_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()


# -------------------------------------------------------------------------------------------------------------- padded


@dataclass(frozen=True)
class PaddedPlan:
    """Rows as padded blocks just around the product; everything else in the model runs on packed rows.

    Neighbouring sequences share a block where their lengths are alike. On a CPU one block for all takes two to three
    times as long at natural lengths, and a single block-diagonal mask longer still.
    """

    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, packed: PackedSequences, *, uniform: bool = False) -> PaddedPlan:
        """The blocks of sequences that all have rows; one for all of them if it is to be `uniform` (see `Block`)."""
        groups = [list(packed.host_lengths)] if uniform else alike(packed.host_lengths)
        firsts = accumulate(map(len, groups), initial=0)
        return cls(
            tuple(Block.of(packed, first, group, uniform=uniform) for first, group in zip(firsts, groups, strict=False))
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Plan.attend`."""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        rows = [block.rows for block in self.blocks]
        parts = zip(self.blocks, q.split(rows), k.split(rows), v.split(rows), strict=True)
        mixed = [block.attend(*part) for block, *part in parts]
        return torch.cat(mixed) if len(mixed) > 1 else mixed[0]


def padding(packed: PackedSequences, backend: str, *, uniform: bool) -> int:
    """Rows that attention computes for nothing; `uniform` as in `PaddedPlan.of`."""
    lengths = packed.without_empty.host_lengths
    if backend != "padded" or not lengths:
        return 0
    if uniform:
        return max(2, len(lengths)) * max(2, *lengths) - sum(lengths)
    return sum(len(group) * max(group) - sum(group) for group in alike(lengths))


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Cuts neighbouring lengths into groups: one joins if that pads no more than _PADDED_SCORES."""
    groups: list[list[int]] = []
    longest = 0  # of the last group
    for length in lengths:
        count, size = len(groups[-1]) if groups else 0, max(longest, length)
        if groups and (count + 1) * size**2 - count * longest**2 - length**2 <= _PADDED_SCORES:
            groups[-1].append(length)
            longest = size
        else:
            groups.append([length])
            longest = length
    return groups


@dataclass(frozen=True)
class Block:
    """Neighbouring sequences, padded to the longest: [B, L].

    Attributes:
        rows: of all of them, T.
        index: int64 [T], row -> flat position in the block.
        mask: bool [B, L], True at rows, or None if nothing is padded.
    """

    rows: int
    count: int
    size: int
    index: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, packed: PackedSequences, first: int, lengths: Sequence[int], *, uniform: bool) -> Block:
        """The block of the sequences from `first` on, which have these lengths.

        Args:
            uniform: always with a mask and at least 2 x 2, since a compiler makes graphs of their own for None, 0, 1.
        """
        least, start = 2 if uniform else 1, sum(packed.host_lengths[:first])
        rows, count, size = sum(lengths), max(least, len(lengths)), max(least, *lengths)
        own = slice(start, start + rows)
        index = (packed.sequence_ids[own] - first) * size + packed.positions[own]
        if min(lengths) == size and not uniform:
            return cls(rows, count, size, index, None)
        # No row of the mask is all False.
        filled = F.pad(packed.lengths[first : first + len(lengths)], (0, count - len(lengths)), value=size)
        return cls(rows, count, size, index, torch.arange(size, device=index.device) < filled[:, None])

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Plan.attend`; as many heads of k and v as of q."""
        padded_q, padded_k, padded_v = (self.pad(x).transpose(1, 2) for x in (q, k, v))
        mask = None if self.mask is None else self.mask[:, None, None, :]
        out = F.scaled_dot_product_attention(padded_q, padded_k, padded_v, attn_mask=mask)
        return self.unpad(out.transpose(1, 2))

    def pad(self, rows: Tensor) -> Tensor:
        """[T, ...] -> [B, L, ...] with zeros at the padding."""
        if self.mask is None:
            return rows.view(self.count, self.size, *rows.shape[1:])
        block = rows.new_zeros(self.count * self.size, *rows.shape[1:])
        return block.index_copy(0, self.index, rows).view(self.count, self.size, *rows.shape[1:])

    def unpad(self, block: Tensor) -> Tensor:
        """[B, L, ...] -> [T, ...], the inverse of `pad`."""
        flat = block.flatten(0, 1)
        return flat if self.mask is None else flat.index_select(0, self.index)


# ------------------------------------------------------------------------------------------------------------- kernels


@dataclass(frozen=True)
class KernelPlan:
    """FlashAttention on packed rows, torch's or the package's.

    Attributes:
        backend: "varlen" or "flash".
        cu_seqlens: int32 [B + 1].
        longest: at least L.
    """

    backend: str
    cu_seqlens: Tensor
    longest: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Plan.attend`."""
        ends, longest = self.cu_seqlens, self.longest
        if self.backend == "varlen":
            from torch.nn.attention.varlen import varlen_attn

            out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, -1), enable_gqa=True)
            return cast(Tensor, out)
        try:  # transformers asks for every package that a model's code imports, unless in such a block
            from flash_attn import flash_attn_varlen_func
        except ImportError:
            raise

        fixed = torch.are_deterministic_algorithms_enabled()  # as torch's own kernel asks
        out = flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=False, deterministic=fixed)
        return cast(Tensor, out)


# ---------------------------------------------------------------------------------------------------------------- flex


@dataclass(frozen=True)
class FlexPlan:
    """Flex attention. Uncompiled, as on a CPU in tests, it computes the whole matrix and has no backward."""

    mask: Any  # a BlockMask; its module is imported late

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Plan.attend`."""
        from torch.nn.attention.flex_attention import flex_attention

        run: Callable[..., Any] = flex_attention  # a compiled block takes it into its graph
        if q.is_cuda and not torch.compiler.is_compiling():
            run = _compiled_flex_attention()
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return cast(Tensor, run(q, k, v, block_mask=self.mask, enable_gqa=True)[0].transpose(0, 1))


@cache
def _compiled_flex_attention() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def document_mask(packed: PackedSequences) -> Any:
    """The BlockMask under which rows attend within their own sequence.

    torch's create_block_mask would evaluate all T x T pairs. Sequences are contiguous, so the ids of a block's first
    and last row tell which blocks it meets.
    """
    from torch.nn.attention.flex_attention import BlockMask

    ids, rows = packed.sequence_ids, packed.tokens.numel()
    starts = torch.arange(0, rows, _FLEX_BLOCK, device=ids.device)
    first, last = ids[starts], ids[(starts + _FLEX_BLOCK - 1).clamp(max=rows - 1)]
    meet = (first[:, None] <= last) & (first <= last[:, None])
    whole = (first == last) & (starts + _FLEX_BLOCK <= rows)  # filled by one sequence
    full = meet & whole[:, None] & whole

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1).int()[None, None], order.int()[None, None]

    def same_sequence(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ids[query] == ids[key]

    return BlockMask.from_kv_blocks(
        *listed(meet & ~full),
        *listed(full),
        BLOCK_SIZE=_FLEX_BLOCK,
        mask_mod=same_sequence,
        seq_lengths=(rows, rows),
    )
