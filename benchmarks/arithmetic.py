"""What the paper's run needs on 16 H100s, published and now: counted, not measured.

    python -m benchmarks.arithmetic

LLaDA-8B on the meta device with the paper's LoRA; 200,000 steps of 128 documents, linear schedules, so that on average
half of a document's tokens survive and a quarter are masks. FLOPs by `retrofit.training.throughput`; what the published
step computes beyond that (canvas, padding, logits everywhere) is counted for it. No recomputation on either side.
"""

from __future__ import annotations

import torch

from retrofit.checkpoints.adapters import HEAD, AdapterSettings, inject, select_trainable
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion
from retrofit.training.throughput import PEAKS, UsefulFlops, Work

from .toy import WINDOW, natural_lengths

STEPS, DOCUMENTS, GPUS = 200_000, 128, 16
SHARES = (0.3, 0.4, 0.5)
"""Shares of the peak for which hours are given; which of them is reached has not been measured."""


def flops_8b() -> UsefulFlops:
    """FLOPs of the paper's FlexMDM with LoRA, r 128 on q, k, v and the head."""
    config = FlexMDMConfig()
    with torch.device("meta"):
        model = FlexMDMForMaskedDiffusion(config)
    inject(model, AdapterSettings(128, 128.0, 0.1, ("q_proj", "k_proj", "v_proj", HEAD)))
    select_trainable(model)
    named = dict(model.named_parameters())
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    return UsefulFlops(config, {name: parameter.shape for name, parameter in named.items()}, trained)


def packed(lengths: list[int]) -> Work:
    """Mean work of packed documents at t uniform: n t survive and a slot, n / 4 are masks, E (n t + 1)^2."""
    return Work(
        rows=round(sum(n / 2 + 1 for n in lengths)),
        masks=round(sum(n / 4 for n in lengths)),
        sequences=len(lengths),
        squares=round(sum(n * n / 3 + n + 1 for n in lengths)),
    )


def main() -> None:
    flops = flops_8b()
    canvas = WINDOW + 1
    cases = {
        "published, any lengths": Work(DOCUMENTS * canvas, DOCUMENTS * WINDOW, DOCUMENTS, DOCUMENTS * canvas**2),
        "ours, windows filled": packed([WINDOW] * DOCUMENTS),
        "ours, log-normal, median 300": packed(natural_lengths(DOCUMENTS)),
    }
    print(f"{'a step of 128 documents':<32}{'rows':>9}{'logits':>9}{'PFLOP':>8}{'less':>7}", end="")
    print("".join(f"{f'days at {share:.0%}':>14}" for share in SHARES))
    first = flops(cases["published, any lengths"])
    for name, work in cases.items():
        count = flops(work)
        days = (STEPS * count / (share * GPUS * PEAKS["H100"]) / 86400 for share in SHARES)
        print(f"{name:<32}{work.rows:>9,}{work.masks:>9,}{count / 1e15:>8.2f}{first / count:>6.1f}x", end="")
        print("".join(f"{day:>14.2f}" for day in days))


if __name__ == "__main__":
    main()
