"""Three ways to take the same training step: packed (ours), the published procedure, and the usual padded batch.

All three corrupt the same documents with the same noise and run the same modules, LoRA in PEFT's own form beside ours;
what differs is which rows are computed. The published procedure (arXiv 2509.01025, its code) lays every document on a
canvas of window + 1 positions, attends to its padding and computes logits at every position. The usual padded batch is
the strongest way without packing: trimmed to its longest document, padding masked, logits at masks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW

from retrofit.checkpoints.adapters import lora_layers
from retrofit.flexmdm import FlexMDMForMaskedDiffusion
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths
from retrofit.objective import FlexMDMObjective
from retrofit.objective.interpolant import Corrupted
from retrofit.objective.losses import insertion_sums
from retrofit.objective.objectives import FlexMDMExamples

from .toy import right_padded

Mark = Callable[[str], AbstractContextManager[Any]]
Terms = dict[str, Tensor]  # "unmasking" and "insertion", each [B]


@dataclass(frozen=True)
class Rows:
    """Rows that went through the blocks and through the head."""

    block: int
    head: int


@dataclass(frozen=True)
class Way:
    """A way to compute the loss terms of corrupted documents."""

    name: str
    terms: Callable[[FlexMDMForMaskedDiffusion, FlexMDMObjective, FlexMDMExamples], tuple[Terms, Rows]]


def packed(
    model: FlexMDMForMaskedDiffusion, objective: FlexMDMObjective, examples: FlexMDMExamples
) -> tuple[Terms, Rows]:
    """What training does: survivors and slots only, logits at masks only."""
    batch = examples.micro_batch(range(len(examples.t)))
    return objective.loss_terms(model, batch), Rows(batch.num_tokens, batch.mask_rows.numel())


def published(
    model: FlexMDMForMaskedDiffusion, objective: FlexMDMObjective, examples: FlexMDMExamples
) -> tuple[Terms, Rows]:
    """The full canvas, its padding attended, logits everywhere; the losses are picked from all positions."""
    c, size = examples.corrupted, objective.config.max_sequence_length
    rows = len(c.lengths)
    tokens = _widened(c.tokens, size, examples.slot)
    out = model(
        packed=PackedSequences(tokens.flatten(), cumulative_lengths(torch.full((rows,), size))),
        timesteps=examples.t,
        logit_rows=(torch.arange(size) < size - 1).repeat(rows).nonzero().squeeze(-1),
    )
    logits = out.logits.view(rows, size - 1, -1)
    losses = F.cross_entropy(
        logits.flatten(0, 1).float(), _widened(c.targets, size - 1, -100).flatten(), reduction="none"
    )
    hazard = objective.schedules.unmasking_hazard(examples.t).float()
    unmasking = losses.view(rows, size - 1).sum(1) * hazard
    return {"unmasking": unmasking, "insertion": _insertion(out.expected_gaps, c, examples, objective, size)}, Rows(
        rows * size, rows * (size - 1)
    )


def padded(
    model: FlexMDMForMaskedDiffusion, objective: FlexMDMObjective, examples: FlexMDMExamples
) -> tuple[Terms, Rows]:
    """Trimmed to the longest document, padding computed but not attended, logits at masks."""
    c = examples.corrupted
    rows, size = len(c.lengths), int(c.lengths.max()) + 1
    tokens = _widened(c.tokens, size, examples.slot)
    masked = _widened(c.masked, size, False)
    plan = _Rectangle(torch.arange(size) <= c.lengths[:, None])
    with patch("retrofit.flexmdm.llada.plan_attention", return_value=plan):
        out = model(
            packed=PackedSequences(tokens.flatten(), cumulative_lengths(torch.full((rows,), size))),
            timesteps=examples.t,
            logit_rows=masked.flatten().nonzero().squeeze(-1),
        )
    losses = F.cross_entropy(out.logits.float(), c.targets[c.masked], reduction="none")
    hazard = objective.schedules.unmasking_hazard(examples.t).float()
    unmasking = torch.zeros(rows).index_add(0, masked.nonzero()[:, 0], losses) * hazard
    return {"unmasking": unmasking, "insertion": _insertion(out.expected_gaps, c, examples, objective, size)}, Rows(
        rows * size, int(masked.sum())
    )


WAYS = (Way("packed (ours)", packed), Way("published", published), Way("padded, masked", padded))


class Step:
    """A model with its optimizer, trained in one of the ways."""

    def __init__(self, model: FlexMDMForMaskedDiffusion, way: Way) -> None:
        self.model, self.way = model, way
        if way is not WAYS[0]:
            for _, layer in lora_layers(model):
                layer.lora_variant.clear()  # PEFT's own form
        self.objective = FlexMDMObjective(model.config, seed=0)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(self.parameters, lr=1e-4, fused=True)

    def examples(self, documents: Sequence[Tensor], ordinal: int) -> FlexMDMExamples:
        """The documents, corrupted at stratified times."""
        count = len(documents)
        times = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        return self.objective.prepare(right_padded(documents), torch.arange(ordinal, ordinal + count), times)

    def loss(self, examples: FlexMDMExamples) -> tuple[Tensor, Rows]:
        """Training's loss, and what was computed for it."""
        terms, rows = self.way.terms(self.model, self.objective, examples)
        window = self.objective.config.max_sequence_length - 1
        return torch.stack([term.sum() for term in terms.values()]).sum() / (len(examples.t) * window), rows

    def take(self, documents: Sequence[Tensor], ordinal: int, mark: Mark = nullcontext) -> Rows:
        """One step: noise, forward, backward, clipping, update; `mark` is entered around each, by name."""
        with mark("noise"):
            examples = self.examples(documents, ordinal)
        with mark("forward"):
            loss, rows = self.loss(examples)
        with mark("backward"):
            loss.backward()
        with mark("clip"):
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        with mark("update"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return rows


def _widened(values: Tensor, size: int, fill: int | bool) -> Tensor:
    """[B, L] cut or filled up to [B, size]."""
    return F.pad(values, (0, max(0, size - values.shape[1])), value=fill)[:, :size]


def _insertion(gaps: Tensor, c: Corrupted, examples: FlexMDMExamples, objective: FlexMDMObjective, size: int) -> Tensor:
    """The insertion term of [B * size] expected gaps, by the function that training uses."""
    is_open = _widened(c.open_gaps, size, False)
    sequence = torch.arange(len(c.lengths)).repeat_interleave(size)
    hazard = objective.schedules.insertion_hazard(examples.t)
    return insertion_sums(gaps, _widened(c.gaps, size, 0).flatten(), is_open.flatten(), sequence, hazard)


class _Rectangle:
    """A plan for rows that lie in a rectangle [B, L] already: nothing is moved, and padding is not attended."""

    def __init__(self, attended: Tensor) -> None:
        self.attended = attended

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(*self.attended.shape, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.attended[:, None, None, :])
        return out.transpose(1, 2).flatten(0, 1)
