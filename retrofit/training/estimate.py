"""What one rank's memory will hold, part by part, from the model on the meta device: no GPU, no weights, seconds.

What stands between steps (weights, gradients, the optimizer) is arithmetic on the parameters' sizes and on how the
engine spreads them. What a micro-batch takes on top is measured: the real forward, loss and backward run on fake
tensors, whose shapes and lifetimes are real and which have no memory, and their live bytes are counted.

The largest micro-batch is `rows` rows, the token budget, in documents as long as any, all of them masks: a document's t
decides how many of its rows are, close to t = 0 nearly all, and nothing keeps the documents of one micro-batch from
having small t. How the rows are shared out hardly matters: 8,200 rows of an 8B model take 8.6609 GB as eight equal
documents and 8.6622 GB as sixteen of all lengths.

Compared with live tensors on a CPU, for every engine (tests). Of a GPU three things are assumed and were never checked:
that autocast makes the copies there that it makes on a CPU, that attention keeps what its CPU kernel keeps (no matrix
of scores), and that the reserve covers the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from retrofit.data.store import TokenStore
from retrofit.flexmdm.configuration import FlexMDMConfig
from retrofit.flexmdm.packing import PackedSequences, cumulative_lengths
from retrofit.objective.objectives import MicroBatch, Objective
from retrofit.sections import Recipe

from .engines.fsdp import sharded_units
from .memory import LiveBytes
from .start import Start

_FLOAT = torch.float32.itemsize
_GRAIN = 128
"""A budget that memory decides is a multiple of so many rows."""
_SEARCH = 4
"""Most steps of the search for it."""


@dataclass(frozen=True)
class Layout:
    """How a model is spread over the ranks.

    Attributes:
        engine: "ddp" (one process too), "zero1", "zero2", "zero3" or "fsdp2".
        ranks: of all machines. shards: ranks over which what is split is split. local_ranks: on one machine.
        zero: DeepSpeed's section zero_optimization, resolved.
    """

    engine: str = "ddp"
    ranks: int = 1
    shards: int = 1
    local_ranks: int = 1
    zero: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, kind: str, *, ranks: int, replicas: int, local_ranks: int, deepspeed: Mapping[str, Any] | None
    ) -> Layout:
        """The layout of a launch.

        Args:
            kind: as `Processes` has it. replicas: of FSDP2's hybrid sharding. deepspeed: its resolved configuration.
        """
        zero = deepspeed["zero_optimization"] if deepspeed is not None else {}
        engine = {"zero": f"zero{zero.get('stage')}", "fsdp": "fsdp2"}.get(kind, "ddp")
        return cls(engine, ranks, ranks // replicas, local_ranks, zero)


@dataclass(frozen=True)
class Parts:
    """Bytes of one rank.

    Attributes:
        frozen: weights that are not trained.
        trained: weights that are, float32, with an engine's second copy of them.
        gradients: float32, as far as they outlive their module's backward.
        moments: Adam's two. average: the moving average, if one is kept.
        gathered: what the engine gathers or collects for a time: whole weights of modules, buckets.
        activations: of the largest micro-batch, with the copies in bfloat16 that autocast makes of weights.
        logits: what that micro-batch takes more because all of its rows are masks.
    """

    frozen: int
    trained: int
    gradients: int
    moments: int
    average: int
    gathered: int
    activations: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))


# ------------------------------------------------------------------------------------------------------------ standing


def standing(begin: Start, layout: Layout, *, bf16: bool, average: bool) -> Parts:
    """All that does not depend on the token budget."""
    return {"ddp": _replicated, "fsdp2": _fully_sharded}.get(layout.engine, _zero)(begin, layout, bf16, average)


def _sizes(begin: Start) -> tuple[int, int]:
    """(bytes of the frozen weights, number of the trained ones)."""
    trained = set(begin.trainable)
    frozen = sum(size for name, size in begin.weights.sizes.items() if name not in trained)
    return frozen, sum(begin.weights.shapes[name].numel() for name in trained)


def _replicated(begin: Start, layout: Layout, bf16: bool, average: bool) -> Parts:
    frozen, trained = _sizes(begin)
    # DDP's buckets are the gradients.
    return Parts(
        frozen, _FLOAT * trained, _FLOAT * trained, 2 * _FLOAT * trained, average * _FLOAT * trained, gathered=0
    )


def _zero(begin: Start, layout: Layout, bf16: bool, average: bool) -> Parts:
    """DeepSpeed 0.19, as measured and read in its `runtime/zero`; defaults of what the JSON leaves out are its own."""
    frozen, trained = _sizes(begin)
    stage, shards = int(layout.engine.removeprefix("zero")), layout.shards
    part = _FLOAT * math.ceil(trained / shards)
    sizes = {name: shape.numel() for name, shape in begin.weights.shapes.items()}
    bucket = int(layout.zero.get("reduce_bucket_size", 5e8))
    # A full bucket is flattened once more to be reduced; a gradient that no bucket holds is reduced by itself.
    reduced = max(min(bucket, trained), *(sizes[name] for name in begin.trainable))
    if stage < 3:
        buffers = 2 if layout.zero.get("overlap_comm", False) else 1
        return Parts(
            frozen=frozen,
            trained=_FLOAT * trained + part,
            # Stage 1 keeps them whole, and averages them into its part; stage 2 adds a part to the parts so far.
            gradients=_FLOAT * trained + part if stage == 1 else 2 * part,
            moments=2 * part,
            average=average * part,
            gathered=_FLOAT * (buffers * bucket + reduced),
        )
    # Small weights are never let go of. Of the others, so many are kept as will be used again soon.
    least = int(layout.zero.get("stage3_param_persistence_threshold", 1e5))
    widths = {name: dtype.itemsize for name, dtype in begin.weights.dtypes.items()}
    persistent = sum(sizes[name] * widths[name] for name in sizes if sizes[name] < least)
    live = int(layout.zero.get("stage3_max_live_parameters", 1e9)) + int(
        layout.zero.get("stage3_prefetch_bucket_size", 5e7)
    )
    others = {name: size for name, size in sizes.items() if size >= least}
    whole = sum(size * widths[name] for name, size in others.items())
    share = min(1.0, live / max(1, sum(others.values())))
    return Parts(
        frozen=math.ceil(frozen / shards),
        trained=2 * part,  # its float32 weights, and the masters apart from them
        gradients=part,
        moments=2 * part,
        average=average * part,
        gathered=persistent + int(share * whole) + _FLOAT * (bucket + reduced),
    )


def _fully_sharded(begin: Start, layout: Layout, bf16: bool, average: bool) -> Parts:
    """Tensors are split by their first axis, the last ranks padded. The root's weights stay whole during a step.

    Of the other units the one that computes is whole, the next is being gathered (into a flat buffer, then out of it),
    and the gradient of the one before is being reduced, in float32.
    """

    def split(parameter: nn.Parameter) -> int:
        return math.ceil(parameter.shape[0] / layout.shards) * math.prod(parameter.shape[1:])

    in_bf16, as_stored, root = sharded_units(begin.model)
    frozen = trained = 0
    whole: list[int] = []  # bytes of each unit when it is gathered, the root last
    reduced: list[int] = []  # and of its gradient while it is reduced: as it is computed, and in float32
    for unit in (*in_bf16, *as_stored, root):
        parameters = list(unit.parameters())
        stored = max(parameter.dtype.itemsize for parameter in parameters)  # a unit has one dtype
        width = torch.bfloat16.itemsize if bf16 and unit in in_bf16 else stored
        frozen += sum(stored * split(parameter) for parameter in parameters if not parameter.requires_grad)
        trained += sum(split(parameter) for parameter in parameters if parameter.requires_grad)
        whole.append(width * sum(parameter.numel() for parameter in parameters))
        reduced.append((width + _FLOAT) * sum(p.numel() for p in parameters if p.requires_grad))
    largest, *others = sorted(whole[:-1], reverse=True)
    return Parts(
        frozen=frozen,
        trained=_FLOAT * trained,
        gradients=_FLOAT * trained,
        moments=2 * _FLOAT * trained,
        average=average * _FLOAT * trained,
        gathered=whole[-1] + largest + 2 * max(others, default=0) + max(reduced),
    )


# ---------------------------------------------------------------------------------------------------------- micro-batch


def largest_lengths(rows: int, longest: int, *, flexible: bool) -> list[int]:
    """Rows of each document of the largest micro-batch (see the module), longest first.

    Args:
        longest: rows of the longest document, its slot included; at most `rows`.
        flexible: a FlexMDM's documents, which may be shorter, rather than windows of `longest` rows.
    """
    count, rest = divmod(rows, longest)
    return [longest] * count + ([rest] if rest and flexible else [])


def largest_batch(rows: int, longest: int, config: Any, *, masked: bool = True) -> MicroBatch:
    """The largest micro-batch of a budget (see the module).

    Args:
        longest: rows of the longest document, its slot included; at most `rows`.
        config: of the model.
        masked: all rows are masks; False: none is.
    """
    flexible = isinstance(config, FlexMDMConfig)
    lengths = largest_lengths(rows, longest, flexible=flexible)
    rows, count, masks = sum(lengths), len(lengths), sum(lengths) if masked else 0

    def flags(value: bool) -> Tensor | None:
        return torch.full((rows,), value) if flexible else None

    packed = PackedSequences(
        torch.full((rows,), config.mask_token_id if masked else config.pad_token_id),
        cumulative_lengths(torch.tensor(lengths, dtype=torch.int64)),
        kept=flags(False),
        closed=flags(False),
        host_lengths=tuple(lengths),
    )
    return MicroBatch(
        packed=packed,
        timesteps=torch.full((count,), 0.5, dtype=torch.float64),
        weights=torch.ones(count, dtype=torch.float64),
        ordinals=torch.zeros(count, dtype=torch.int64),
        mask_rows=torch.arange(masks),
        targets=torch.zeros(masks, dtype=torch.int64),
        gaps=torch.zeros(rows, dtype=torch.int64) if flexible else None,
        open_gaps=flags(True),
    )


def micro_batch_bytes(
    model: Any,
    objective: Objective,
    rows: int,
    longest: int,
    layout: Layout,
    *,
    bf16: bool,
    masked: bool = True,
) -> int:
    """Most bytes that are alive at a time during the largest micro-batch, beside weights and gradients.

    Args:
        model: on the meta device; it is left as it is.
        rows, longest, masked: see `largest_batch`.
    """
    twin = copy.deepcopy(model).train()
    twin.model.attention = "padded"
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"), LiveBytes("cpu") as live:
        _make_fake(twin, sharded_units(twin)[0] if bf16 and layout.engine == "fsdp2" else [])
        _prepare_gradients(twin, whole=layout.engine in ("ddp", "zero1"))
        before = live.current
        batch = largest_batch(rows, longest, model.config, masked=masked)
        # The engine of ZeRO-3 has autocast keep no copies of weights either.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16, cache_enabled=layout.engine != "zero3"):
            loss = torch.stack([term.sum() for term in objective.loss_terms(twin, batch).values()]).sum()
            with torch.autocast("cpu", enabled=False):
                loss.backward()
        return live.peak - before


def _make_fake(model: nn.Module, in_bf16: Collection[nn.Module]) -> None:
    """Puts fake tensors on the CPU in place of parameters on the meta device, which autocast passes over.

    Args:
        in_bf16: modules whose parameters shall be bfloat16.
    """
    halved = {parameter for module in in_bf16 for parameter in module.parameters()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                dtype = torch.bfloat16 if parameter in halved else parameter.dtype
                values = torch.empty(parameter.shape, dtype=dtype, device="cpu")
                module._parameters[name] = nn.Parameter(values, parameter.requires_grad)


def _prepare_gradients(model: nn.Module, *, whole: bool) -> None:
    """Gradients as a second micro-batch finds them; where the engine shards them, each is let go of at once."""
    for parameter in model.parameters():
        if parameter.requires_grad and whole:
            parameter.grad = torch.empty_like(parameter)
        elif parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_let_go)


def _let_go(parameter: Tensor) -> None:
    parameter.grad = None


# ------------------------------------------------------------------------------------------------------------ estimate


@dataclass(frozen=True)
class Estimate:
    """The memory of one rank as a function of the token budget.

    Attributes:
        begin: what training starts from.
        model: a copy of its model that stays on the meta device.
        longest: rows of the longest document, its slot included (an MDM's window).
    """

    begin: Start
    model: Any
    objective: Objective
    longest: int
    layout: Layout
    bf16: bool
    average: bool

    @classmethod
    def of(
        cls, recipe: Recipe, begin: Start, objective: Objective, store: TokenStore | None, layout: Layout
    ) -> Estimate:
        """The estimate of a recipe's run, whose model has to be on the meta device still.

        Without the data, their longest document is one that fills the window.
        """
        section = recipe.training
        longest = longest_document(recipe, store)
        model, average = copy.deepcopy(begin.model), section.ema_decay is not None
        return cls(begin, model, objective, longest, layout, section.bf16, average)

    def parts(self, rows: int) -> Parts:
        """What the largest micro-batch of a budget needs, part by part."""
        unmasked = self._micro_batch(rows, masked=False)
        return replace(
            self._standing, activations=unmasked, logits=max(0, self._micro_batch(rows, masked=True) - unmasked)
        )

    def total(self, rows: int) -> int:
        """Bytes that a budget needs."""
        return self._standing.total + self._micro_batch(rows, masked=True)

    @cached_property
    def _standing(self) -> Parts:
        return standing(self.begin, self.layout, bf16=self.bf16, average=self.average)

    @cached_property
    def _measured(self) -> dict[tuple[int, bool], int]:
        return {}

    def _micro_batch(self, rows: int, *, masked: bool) -> int:
        if (rows, masked) not in self._measured:
            self._measured[rows, masked] = micro_batch_bytes(
                self.model, self.objective, rows, self.longest, self.layout, bf16=self.bf16, masked=masked
            )
        return self._measured[rows, masked]

    def largest(self, usable: int, most: int) -> int:
        """The largest budget that fits into `usable` bytes, within a hundredth of them; 0 if none does.

        Args:
            most: rows beyond which a larger budget is pointless; at least the longest document.
        """
        low, high = self.longest, most
        at_high = self.total(high)
        if at_high <= usable:
            return high
        at_low = self.total(low)
        if at_low > usable:
            return 0
        for _ in range(_SEARCH):
            # A peak is the largest of several sums that grow with the rows: convex, so the chord lies above it.
            rows = (low + (high - low) * (usable - at_low) // (at_high - at_low)) // _GRAIN * _GRAIN
            if rows <= low or usable - at_low < usable / 100:
                break
            at_rows = self.total(rows)
            if at_rows <= usable:
                low, at_low = rows, at_rows
            else:
                high, at_high = rows, at_rows
        return low


def pointless_beyond(recipe: Recipe, longest: int, ranks: int) -> int:
    """Rows of the largest micro-batch that a step can fill: its documents, all of them of the longest."""
    section = recipe.training
    bins = ranks * (section.gradient_accumulation_steps or 1)
    return -(-section.documents_per_step // bins) * longest


def longest_document(recipe: Recipe, store: TokenStore | None) -> int:
    """Rows of the longest document: of the data, or without them of the window; an MDM's always fill it."""
    if recipe.objective.name == "mdm":
        return recipe.objective.window
    if store is None:
        return recipe.objective.window + 1
    return max(record.longest for record in store.manifest.splits.values()) + 1
