"""What gradient checkpointing and compilation of the blocks save and cost.

    python -m benchmarks.blocks            # memory and CPU time on a toy, memory at 8B's shape
    python -m benchmarks.blocks --compile  # CPU time of compiled blocks too

Toy: d 256, 8 layers, 2,000 rows of documents of log-normal length, float32. 8B: d 4096, MLP 12288, LoRA r=128 on q, k
and v, bfloat16 autocast, the variable-length kernel, on fake tensors. "Kept" is what lives from the forward to the
backward, "peak" the most that lived at once, both without weights and their gradients. CPU seconds are medians of
interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from retrofit.checkpoints.adapters import AdapterSettings, inject, select_trainable
from retrofit.checkpoints.loading import on_meta
from retrofit.checkpoints.weights import materialise
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion
from retrofit.flexmdm.attention import KernelPlan
from retrofit.flexmdm.llada import rotary_angles
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths

MODES: dict[str, dict[str, Any] | None] = {
    "none": None,
    "every 4th": {"every_n_layers": 4},
    "every 2nd": {"every_n_layers": 2},
    "selective": {"selective": True},
    "every block": {},
}


class Live(TorchDispatchMode):
    """Counts the bytes of storages made inside that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in old | self.seen:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        size, key = storage.nbytes(), id(storage)
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def set_mode(model: FlexMDMForMaskedDiffusion, mode: str) -> None:
    model.gradient_checkpointing_disable()
    if (settings := MODES[mode]) is not None:
        model.gradient_checkpointing_enable(**settings)


def toy() -> tuple[FlexMDMForMaskedDiffusion, PackedSequences, Tensor]:
    torch.manual_seed(0)
    config = FlexMDMConfig(
        vocab_size=8192, d_model=256, n_layers=8, n_heads=8, mlp_hidden_size=768, max_sequence_length=1024,
        mask_token_id=8190, pad_token_id=8191, eos_token_id=8191, time_hidden_size=256,
    )  # fmt: skip
    model = FlexMDMForMaskedDiffusion(config).train()
    lengths = (150 * torch.exp(0.6 * torch.randn(64))).long().clamp(1, 1024)
    lengths = lengths[: int((lengths.cumsum(0) <= 2000).sum())]
    tokens = torch.randint(8191, (int(lengths.sum()),))
    tokens[torch.rand(tokens.shape) < 0.5] = 8190
    return model, PackedSequences(tokens, cumulative_lengths(lengths)), torch.rand(len(lengths)).double()


def step(model: FlexMDMForMaskedDiffusion, packed: PackedSequences, t: Tensor, before: Callable[[], None]) -> None:
    """One forward and backward of the blocks; `before` is called between them."""
    model.zero_grad(set_to_none=True)
    hidden = model.model(packed, modulations=modulations(model, packed, t))
    before()
    hidden.square().sum().backward()


def modulations(model: FlexMDMForMaskedDiffusion, packed: PackedSequences, t: Tensor) -> list[tuple[Tensor, Tensor]]:
    groups = model.time_conditioning(t)
    rows = packed.sequence_ids
    per_group = [((1 + scale)[rows], shift[rows]) for scale, shift in groups]
    return [per_group[i // model.config.time_group_size] for i in range(model.config.n_layers)]


def interleaved(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def toy_table(rounds: int) -> None:
    model, packed, t = toy()
    rows = packed.tokens.numel()

    def run(mode: str) -> Callable[[], None]:
        def once() -> None:
            set_mode(model, mode)
            step(model, packed, t, lambda: None)

        return once

    seconds = interleaved({mode: run(mode) for mode in MODES}, rounds)
    print(f"{rows} rows, {packed.num_sequences} documents    kept MB    peak MB    CPU s")
    for mode in MODES:
        set_mode(model, mode)
        step(model, packed, t, lambda: None)
        model.zero_grad(set_to_none=False)  # gradients are there, so that they are not counted
        kept: list[int] = []
        with Live() as live:
            hidden = model.model(packed, modulations=modulations(model, packed, t))
            kept.append(live.now)
            hidden.square().sum().backward()
        print(f"{mode:<28} {kept[0] / 1e6:8.1f}   {live.peak / 1e6:8.1f}   {seconds[mode]:6.2f}")


def bytes_at_8b(mode: str, blocks: int, rows: int) -> int:
    config = FlexMDMConfig(vocab_size=64, n_layers=blocks, mask_token_id=62, pad_token_id=63, eos_token_id=63)
    model = on_meta(config, torch.bfloat16)
    inject(model, AdapterSettings(128, 128.0, 0.1, ("q_proj", "k_proj", "v_proj")))
    select_trainable(model)
    set_mode(model.train(), mode)
    parameters = dict(model.named_parameters())
    with FakeTensorMode():
        materialise(model, lambda name: torch.empty(parameters[name].shape, dtype=parameters[name].dtype))
        plan = KernelPlan("varlen", torch.empty(9, dtype=torch.int32), 1024)
        rotary = rotary_angles(torch.empty(rows, dtype=torch.int64), config.head_size, config.rope_theta)
        modulation = tuple(torch.empty(rows, config.d_model, requires_grad=True) for _ in range(2))
        x = torch.empty(rows, config.d_model, dtype=torch.bfloat16, requires_grad=True)
        with Live() as live, torch.autocast("cpu", torch.bfloat16):
            for block in model.model.blocks:
                x = block(x, plan, rotary, modulation)
            return live.now


def table_8b() -> None:
    print("\n8B's block, LoRA, bf16             kept, KB per token and block")
    for mode in MODES:
        # Four more blocks of 1,024 more rows: what blocks or rows share, weights' bfloat16 copies too, falls out.
        more = [bytes_at_8b(mode, 8, rows) - bytes_at_8b(mode, 4, rows) for rows in (1024, 2048)]
        print(f"{mode:<28} {(more[1] - more[0]) / 4 / 1024 / 1000:8.1f}")


def compile_table(rounds: int) -> None:
    model, packed, t = toy()
    other, _, _ = toy()
    other.compile_blocks()

    def run(which: FlexMDMForMaskedDiffusion, mode: str) -> Callable[[], None]:
        def once() -> None:
            set_mode(which, mode)
            step(which, packed, t, lambda: None)

        return once

    for mode in ("none", "selective", "every block"):
        began = time.process_time()
        run(other, mode)()
        first = time.process_time() - began
        seconds = interleaved({"eager": run(model, mode), "compiled": run(other, mode)}, rounds)
        ratio = seconds["eager"] / seconds["compiled"]
        print(
            f"{mode:<14} eager {seconds['eager']:.2f} s, compiled {seconds['compiled']:.2f} s ({ratio:.2f} times "
            f"as fast); first step {first:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    toy_table(options.rounds)
    table_8b()
    if options.compile:
        print()
        compile_table(options.rounds)


if __name__ == "__main__":
    main()
