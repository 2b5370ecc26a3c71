"""How fast training runs, in numbers by which tools are compared: documents, tokens and useful FLOPs a second.

Useful FLOPs are those of the objective's own arithmetic: nothing for recomputation (gradient checkpointing), for
padding, or for logits of tokens that are not masks.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from retrofit.flexmdm import LLaDAConfig
from retrofit.objective.objectives import MicroBatch

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 FLOP/s by the makers' data sheets, for the first of these names that is in the device's name."""


def peak_flops(device: torch.device) -> float | None:
    """The device's peak in FLOP/s at bfloat16, None where it is not known (any CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the last call on a GPU (by torch's allocator), since the process began on a CPU."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks for: packed rows, masked rows, sequences, and the sum of their squared lengths."""

    rows: int = 0
    masks: int = 0
    sequences: int = 0
    squares: int = 0

    @classmethod
    def of(cls, batch: MicroBatch) -> Work:
        """The work of a micro-batch that lies on the CPU still."""
        lengths = batch.packed.lengths
        return cls(batch.num_tokens, batch.mask_rows.numel(), lengths.numel(), int(lengths.square().sum()))

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Work)))


class UsefulFlops:
    """FLOPs of forward and backward as a function of the work.

    A weight of a linear map costs 2 FLOPs a row going forward, 2 for the gradient of its input, and 2 more if it is
    trained: 4 or 6 a row. Rows are packed rows in the blocks and the insertion head, masks in the LM head, sequences in
    the time conditioning. Attention costs 4 d L^2 a layer for a sequence of L rows (scores and mixing, all heads) going
    forward, twice that going back. Norms, activations and embeddings are left out.

    Args:
        shapes: parameter's name -> shape, factors of an adapter included.
        trained: names of the parameters that are trained.
    """

    def __init__(self, config: LLaDAConfig, shapes: Mapping[str, torch.Size], trained: Collection[str]) -> None:
        self.attention = 12 * config.d_model * config.n_layers
        self.rows = self.masks = self.sequences = 0
        for name, shape in shapes.items():
            if len(shape) != 2:
                continue
            cost = (6 if name in trained else 4) * shape.numel()
            if ".blocks." in name or name.startswith("insertion_head."):
                self.rows += cost
            elif name.startswith("time_conditioning."):
                self.sequences += cost
            elif name.startswith("model.transformer.ff_out.") or (config.weight_tying and name.endswith("wte.weight")):
                self.masks += cost

    def __call__(self, work: Work) -> float:
        """FLOPs of a step of this work."""
        return float(
            self.rows * work.rows
            + self.masks * work.masks
            + self.sequences * work.sequences
            + self.attention * work.squares
        )


@dataclass
class Sums:
    """Sums since the last line of the log. Saved, so that a resumed run logs what an uninterrupted one does.

    Attributes:
        steps, documents: taken. seconds: that the steps took. waiting: seconds in which there was no data.
        rows, slots: computed over all ranks. padding: rows of attention's blocks that hold nothing.
        balanced: rows, had every rank as many as the fullest.
        flops: useful, over all ranks.
        losses: sum of each term. last: of the last step.
    """

    steps: int = 0
    documents: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    rows: int = 0
    slots: int = 0
    padding: int = 0
    balanced: int = 0
    flops: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def add_losses(self, losses: Mapping[str, float]) -> None:
        """One step's terms."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value

    def describe(self, *, world_size: int, peak: float | None) -> dict[str, Any]:
        """The log's fields about speed, waiting included, and about what was computed.

        `tokens_per_second` counts tokens that were computed, slots not; `mfu` is useful FLOPs over what all devices
        could do (None where the peak is unknown); `imbalance` is the fullest rank's rows over the mean, 1 at best.
        """
        seconds = max(self.seconds + self.waiting, 1e-9)
        rate = self.flops / seconds
        return {
            "documents_per_second": self.documents / seconds,
            "tokens_per_second": (self.rows - self.slots) / seconds,
            "tflops_per_second": rate / 1e12,
            "mfu": None if peak is None else rate / (peak * world_size),
            "seconds_per_step": seconds / max(self.steps, 1),
            "tokens_per_step": (self.rows - self.slots) / max(self.steps, 1),
            "slots_per_step": self.slots / max(self.steps, 1),
            "padding_per_step": self.padding / max(self.steps, 1),
            "imbalance": self.balanced / max(self.rows, 1),
        }
