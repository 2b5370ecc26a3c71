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
from .memory import is_out_of_memory, usable_memory
from .preflight import gigabytes
from .processes import Processes
from .start import Start

_SHRINK, _TRIALS = 0.85, 6


@dataclass(frozen=True)
class Budget:
    """Most rows of a micro-batch on one rank.

    Attributes:
        rows: the budget.
        longest: rows of the longest document: no budget is smaller.
        automatic: whether it was found rather than given, and so has to be tried.
        usable: bytes that a rank may fill.
        estimate: that it was found by at this start, or None.
    """

    rows: int
    longest: int
    automatic: bool = False
    usable: int = 0
    estimate: Estimate | None = None

    @property
    def parts(self) -> Parts:
        """What fills the memory by the estimate. Takes seconds for rows that were not estimated before."""
        assert self.estimate is not None
        return self.estimate.parts(self.rows)

    def record(self) -> dict[str, Any]:
        """For the log, in bytes."""
        return {"max_tokens_per_device": self.rows, "usable": self.usable, **asdict(self.parts)}

    def describe(self) -> str:
        """One line: the budget and what fills the memory."""
        parts = self.parts
        named = ", ".join(f"{name} {gigabytes(size)}" for name, size in asdict(parts).items() if size)
        return (
            f"max_tokens_per_device: auto is {self.rows:,} rows: an estimated {gigabytes(parts.total)} of the "
            f"{gigabytes(self.usable)} that a rank may fill ({named})"
        )


def layout_of(processes: Processes, deepspeed: Mapping[str, Any] | None) -> Layout:
    """How the launched job spreads its model."""
    sizes = processes.accelerator.parallelism_config if processes.kind == "fsdp" else None
    return Layout.of(
        processes.kind,
        ranks=processes.world_size,
        replicas=sizes.dp_replicate_size if sizes is not None else 1,
        local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        deepspeed=deepspeed,
    )


def choose_budget(
    recipe: Recipe,
    begin: Start,
    objective: Objective,
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
    if asked != "auto":
        return Budget(asked, longest)
    layout = layout_of(processes, deepspeed)
    found = None if record is None else _recorded(record, recipe, layout)
    if found is not None:
        if processes.is_main:
            announce(f"max_tokens_per_device: auto is {found:,} rows, as before this start")
        return Budget(found, longest, automatic=True)
    usable = min(processes.gather(usable_memory(processes.device, layout.local_ranks)))
    estimate = Estimate.of(recipe, begin, objective, store, layout)

    def find() -> int:
        rows = estimate.largest(usable, pointless_beyond(recipe, longest, layout.ranks))
        if rows == 0:
            parts = estimate.parts(longest)
            raise ValueError(
                f"training.max_tokens_per_device: auto: the longest document, of {longest:,} rows, needs an estimated "
                f"{gigabytes(parts.total)} a rank, which may fill {gigabytes(usable)}; set "
                "training.gradient_checkpointing: true, shard over more ranks (launch/), or give a number to try it"
            )
        return rows

    return Budget(processes.on_main(find), longest, automatic=True, usable=usable, estimate=estimate)


_DECIDE_MEMORY = ("max_tokens_per_device", "gradient_checkpointing", "attention", "compile", "bf16")


def _recorded(record: Mapping[str, Any], recipe: Recipe, layout: Layout) -> int | None:
    """What the run found before, if it still takes as much memory. Another device may have less: it is tried again."""
    same = (record["engine"], record["world_size"]) == (layout.engine, layout.ranks)
    before, now = record["recipe"]["training"], asdict(recipe.training)
    same &= all(before.get(name) == now[name] for name in _DECIDE_MEMORY)
    return record["max_tokens_per_device"] if same else None


def try_budget(budget: Budget, engine: Engine, objective: Objective, config: Any, at: Callable[[str], None]) -> Budget:
    """Takes a step at the largest shape, without its update, and a smaller budget where memory does not suffice.

    Two micro-batches, so that the second finds gradients as in any longer step. Called by all ranks, after the engine
    has laid out its buffers; nothing is left of it but torch's generators, which are seeded afterwards. Shapes are the
    same on all ranks. If one alone runs out of memory amid the collectives of an engine that shards, the others wait
    for it in vain, and the watch says which is missing.

    Args:
        config: of the model.
        at: told what begins.

    Returns:
        a budget that every rank has computed.

    Raises:
        ValueError: memory does not suffice for the longest document, or after some trials, or in a backward after which
            the engine cannot go on.
    """
    if not budget.automatic:
        return budget
    processes = engine.processes
    for trial in range(1, _TRIALS + 1):
        failed = _try_step(budget, engine, objective, config, at)
        if not failed:
            return budget
        rows = max(budget.longest, int(_SHRINK * budget.rows))
        if rows == budget.rows or trial == _TRIALS or ("backward" in failed and not engine.survives_failed_backward):
            break
        if processes.is_main:
            announce(f"out of memory at {budget.rows:,} rows a micro-batch; trying {rows:,}")
        budget = replace(budget, rows=rows)
    return processes.on_main(lambda: _refuse(budget, rows))


def _refuse(budget: Budget, rows: int) -> Budget:
    mend = f"give a smaller number, for example {rows}, " if rows < budget.rows else ""
    raise ValueError(
        f"training.max_tokens_per_device: auto: out of memory at {budget.rows} rows a micro-batch; {mend}set "
        "training.gradient_checkpointing: true, or shard over more ranks (launch/)"
    )


def _try_step(budget: Budget, engine: Engine, objective: Objective, config: Any, at: Callable[[str], None]) -> set[str]:
    """Where any rank ran out of memory: "forward", "backward", both or nowhere. Agreed after each micro-batch."""
    engine.model.train()
    failed: set[str] = set()
    for last in (False, True):
        if not failed:
            place = _out_of_memory(budget, engine, objective, config, at, last=last)
            failed = set(engine.processes.gather(place)) - {""}
    if "backward" not in failed or engine.survives_failed_backward:
        engine.discard()
    engine.model.eval()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return failed


def _out_of_memory(
    budget: Budget, engine: Engine, objective: Objective, config: Any, at: Callable[[str], None], *, last: bool
) -> str:
    """Where this rank runs out of memory in a micro-batch, "" for nowhere."""
    place = "forward"
    try:
        batch = largest_batch(budget.rows, budget.longest, config).to(engine.device)
        with engine.micro_batch(last=last):
            at("trial forward")
            terms = objective.loss_terms(engine.model, batch)
            at("trial backward")
            place = "backward"
            engine.backward(torch.stack([term.sum() for term in terms.values()]).sum())
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return place
    return ""
