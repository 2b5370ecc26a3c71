"""The variable-length kernels, which run on a GPU only, as tests without one have them.

A stand-in has the signature of the kernel, checks what the kernel asks for, and computes by the reference: softmax
attention written out, one sequence and one head at a time, in float64.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor


def reference(q: Tensor, k: Tensor, v: Tensor, ends: list[int]) -> Tensor:
    """float64 [T, H, D]."""
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            scores = q[begin:end, head] @ k[begin:end, group].T / q.shape[-1] ** 0.5
            out[begin:end, head] = scores.softmax(-1) @ v[begin:end, group]
    return out


def stand_in(arguments: dict[str, Any]) -> Tensor:
    """What both kernels ask of their first seven arguments, and the reference's result."""
    q, k, v, ends, other_ends, longest, other_longest = list(arguments.values())[:7]
    assert all(x.dim() == 3 and x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v))
    assert k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[1] % k.shape[1] == 0
    assert ends is other_ends and ends.dtype == torch.int32 and ends.dim() == 1 and ends.is_contiguous()
    lengths = ends.diff()
    assert int(ends[0]) == 0 and int(ends[-1]) == q.shape[0] and (lengths > 0).all()
    assert type(longest) is int and longest == other_longest >= int(lengths.max())
    return reference(q, k, v, ends.tolist()).to(q.dtype)


def install(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Puts stand-ins in the place of both kernels; returns the arguments of every call."""
    from torch.nn.attention import varlen

    calls: list[dict[str, Any]] = []
    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        found = signature.bind(*args, **kwargs).arguments
        assert found["window_size"] == (-1, -1)  # rows attend to both sides
        assert found["query"].shape[1] == found["key"].shape[1] or found["enable_gqa"] is True
        calls.append(found)
        return stand_in(found)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
        window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
        deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
        assert alibi_slopes is block_table is None and not return_attn_probs
        calls.append(dict(q=q, k=k, v=v, a=cu_seqlens_q, b=cu_seqlens_k, c=max_seqlen_q, d=max_seqlen_k))  # noqa: C408
        return stand_in(calls[-1])

    package = ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    return calls
