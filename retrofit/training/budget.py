"""The token budget of a run: the recipe's number, or with `training.max_tokens_per_device: auto` the largest that fits.

It is found by the estimate on all ranks alike, and tried with the largest micro-batches that it allows before the first
step. It changes rounding and nothing else, so a run that goes on where it left off takes the number it had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from retrofit.data.store import TokenStore
from retrofit.objective.objectives import Objective
from retrofit.recipe import Recipe

from .engines.base import Engine
from .estimate import Estimate, Layout, Parts, largest_batch, longest_document, pointless_beyond
from .guard import announce
from .memory import usable_memory
from .preflight import gigabytes
from .processes import Processes
from .start import Start

AUTO = "auto"
_SHRINK, _TRIALS = 0.85, 6


@dataclass(frozen=True)
class Budget:
    """Most rows of a micro-batch on one rank.

    Attributes:
        rows: the budget.
        longest: rows of the longest document: no budget is smaller.
        parts: the estimate it was found by; None where it was given.
        usable: bytes that a rank may fill.
    """

    rows: int
    longest: int
    parts: Parts | None = None
    usable: int = 0

    def record(self) -> dict[str, Any]:
        """For the log, in bytes."""
        assert self.parts is not None
        return {"max_tokens_per_device": self.rows, "usable": self.usable, **asdict(self.parts)}

    def describe(self) -> str:
        """One line: the budget and what fills the memory."""
        assert self.parts is not None
        named = ", ".join(f"{name} {gigabytes(size)}" for name, size in asdict(self.parts).items() if size)
        return (
            f"max_tokens_per_device: auto is {self.rows:,} rows: an estimated {gigabytes(self.parts.total)} of the "
            f"{gigabytes(self.usable)} that a rank may fill ({named})"
        )


def layout_of(processes: Processes, deepspeed: Mapping[str, Any] | None) -> Layout:
    """How the launched job spreads its model."""
    zero = deepspeed["zero_optimization"] if deepspeed is not None else {}
    sizes = processes.accelerator.parallelism_config if processes.kind == "fsdp" else None
    replicas = sizes.dp_replicate_size if sizes is not None else 1
    return Layout(
        {"zero": f"zero{zero.get('stage')}", "fsdp": "fsdp2"}.get(processes.kind, "ddp"),
        ranks=processes.world_size,
        shards=processes.world_size // replicas,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        zero=zero,
    )


def choose_budget(
    recipe: Recipe,
    begin: Start,
    store: TokenStore,
    processes: Processes,
    deepspeed: Mapping[str, Any] | None,
    record: Mapping[str, Any] | None,
) -> Budget:
    """The budget of this start, the same on all ranks. The model has to be on the meta device still.

    Args:
        record: of the checkpoint that is gone on from.

    Raises:
        ValueError: not even the longest document fits.
    """
    asked, longest = recipe.training.max_tokens_per_device, longest_document(recipe, store)
    if asked != AUTO:
        return Budget(asked, longest)
    layout = layout_of(processes, deepspeed)
    found = None if record is None else _recorded(record, layout)
    if found is not None:
        if processes.is_main:
            announce(f"max_tokens_per_device: auto is {found:,} rows, as before this start")
        return Budget(found, longest)
    usable = min(processes.gather(usable_memory(processes.device, layout.local_ranks)))
    estimate = Estimate.of(recipe, begin, store, layout)

    def find() -> Budget:
        rows = estimate.largest(usable, pointless_beyond(recipe, longest, layout.ranks))
        parts = estimate.parts(rows or longest)
        if rows == 0:
            raise ValueError(
                f"training.max_tokens_per_device: auto: the longest document, of {longest:,} rows, needs an estimated "
                f"{gigabytes(parts.total)} a rank, which may fill {gigabytes(usable)}; set "
                "training.gradient_checkpointing: true, shard over more ranks (launch/), or give a number to try it"
            )
        return Budget(rows, longest, parts, usable)

    return processes.on_main(find)


def _recorded(record: Mapping[str, Any], layout: Layout) -> int | None:
    """What the run found before, if it still computes alike."""
    same = (record["engine"], record["world_size"]) == (layout.engine, layout.ranks)
    was_auto = record["recipe"]["training"]["max_tokens_per_device"] == AUTO
    return record["max_tokens_per_device"] if same and was_auto else None


def try_budget(budget: Budget, engine: Engine, objective: Objective, config: Any, at: Callable[[str], None]) -> Budget:
    """Takes a step at the largest shape, without its update, and a smaller budget where memory does not suffice.

    Two micro-batches, so that the second finds gradients as in any longer step. Called by all ranks, after the engine
    has laid out its buffers; nothing is left of it but torch's generators, which are seeded afterwards.

    Args:
        config: of the model.
        at: told that a micro-batch begins; whoever is not heard of any more is named by the watch.

    Returns:
        a budget that every rank has computed.

    Raises:
        ValueError: memory does not suffice for the least budget, or after so many trials.
    """
    if budget.parts is None:
        return budget
    processes = engine.processes
    for _ in range(_TRIALS):
        if not processes.any(_runs_out(budget, engine, objective, config, at)):
            return budget
        rows = max(budget.longest, int(_SHRINK * budget.rows))
        if rows == budget.rows:
            break
        if processes.is_main:
            announce(f"out of memory at {budget.rows:,} rows a micro-batch; trying {rows:,}")
        budget = replace(budget, rows=rows)
    return processes.on_main(lambda: _refuse(budget))


def _refuse(budget: Budget) -> Budget:
    raise ValueError(
        f"training.max_tokens_per_device: auto: out of memory at {budget.rows:,} rows a micro-batch; the longest "
        f"document has {budget.longest:,}; set training.gradient_checkpointing: true, or shard over more ranks (launch/)"
    )


def _runs_out(
    budget: Budget, engine: Engine, objective: Objective, config: Any, at: Callable[[str], None]
) -> bool:
    """Whether memory does not suffice on this rank."""

    def micro_batch(*, last: bool) -> None:
        batch = largest_batch(budget.rows, budget.longest, config).to(engine.device)
        with engine.micro_batch(last=last):
            at("trial")
            terms = objective.loss_terms(engine.model, batch)
            engine.backward(torch.stack([term.sum() for term in terms.values()]).sum())

    engine.model.train()
    try:
        micro_batch(last=False)
        micro_batch(last=True)
        ran_out = False
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        ran_out = True
    engine.discard()
    engine.model.eval()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
    return ran_out
