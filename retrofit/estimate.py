"""What a run will need, before it is launched: a rank's memory by part, the largest token budget, sizes of checkpoints.

Nothing is read but configurations: a directory with the model's config.json will do, and where the data are absent,
documents that fill the window are assumed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from retrofit.checkpoints import loading
from retrofit.data.store import TokenStore
from retrofit.recipe import Recipe, load_recipe
from retrofit.training import start
from retrofit.training.estimate import Estimate, Layout, Parts, pointless_beyond
from retrofit.training.launch_file import LaunchFile
from retrofit.training.loop import build_objective
from retrofit.training.memory import RESERVE, usable, usable_memory
from retrofit.training.preflight import checkpoint_bytes, gigabytes

_NAMES = {
    "frozen": "frozen weights",
    "trained": "trained weights",
    "gradients": "gradients",
    "moments": "Adam's moments",
    "average": "average (ema_decay)",
    "gathered": "gathered, buckets",
    "activations": "activations",
    "logits": "logits",
}
_KINDS = {"DEEPSPEED": "zero", "FSDP": "fsdp"}


def estimate(
    path: Path,
    overrides: Sequence[str] = (),
    *,
    launch: Path | None = None,
    num_processes: int | None = None,
    memory: float | None = None,
) -> None:
    """Prints the estimate of a recipe.

    Args:
        launch: the accelerate config file that the recipe is to be launched with; without one, data parallel.
        num_processes: over all machines, where not the launch file's number.
        memory: of a device, in GB (1e9 bytes); None: of this machine's.

    Raises:
        ValueError: recipe, launch file, model and data do not fit together, or the model's config.json is not here.
    """
    recipe = load_recipe(path, overrides)
    layout = _layout(recipe, launch, num_processes)
    store = TokenStore.open(recipe.data.path, "train") if Path(recipe.data.path).exists() else None
    _check_model_is_here(recipe)
    begin = start.from_recipe(recipe, store, shapes_only=True)
    objective = build_objective(recipe, begin.model.config, recipe.training.seed)
    found = Estimate.of(recipe, begin, objective, store, layout)

    print(f"model        {begin.describe()}")
    print(f"engine       {layout.engine}, {layout.ranks} ranks, {layout.local_ranks} on a machine")
    fillable, whose = _fillable(memory, layout)
    print(f"memory       {gigabytes(fillable)} may be filled by a rank: {whose}, {RESERVE:.0%} of it in reserve")
    origin = "" if store is not None else f"; there are no data at {recipe.data.path}, so they are to fill the window"
    print(f"documents    of {found.longest:,} rows at most{origin}")

    most = pointless_beyond(recipe, found.longest, layout.ranks)
    largest = found.largest(fillable, most)
    asked = recipe.training.max_tokens_per_device
    rows = (largest or found.longest) if asked == "auto" else min(asked, most)
    parts = found.parts(rows)
    print(f"\none rank, with a micro-batch of {rows:,} rows, all of them masks:")
    _print_parts(parts)
    verdict = "fits" if parts.total <= fillable else f"DOES NOT FIT: {gigabytes(parts.total - fillable)} too much"
    print(f"  {'total':20}{gigabytes(parts.total):>12}  {verdict}\n")
    if largest == 0:
        print("largest      none: the longest document alone does not fit")
    else:
        why = "; a step has no more for a rank" if largest == most else ""
        print(f"largest      training.max_tokens_per_device: {largest}{why}")
    sizes = checkpoint_bytes(begin, average=recipe.training.ema_decay is not None)
    print(
        f"checkpoints  {gigabytes(sizes.checkpoint)} each, {gigabytes(sizes.state)} of it training state; "
        f"final/ takes {gigabytes(sizes.weights)}"
    )
    print("unchecked    none of this was ever compared with a GPU; on a CPU the numbers are the bytes of live tensors")
    print("             (gathered, buckets: an upper bound). The reserve has to cover what a GPU needs beyond that")


def _layout(recipe: Recipe, launch: Path | None, processes: int | None) -> Layout:
    if launch is None:
        ranks = processes or 1
        recipe.training.check_world_size(ranks)
        return Layout("ddp", ranks, ranks, ranks)
    file = LaunchFile.read(launch, processes)
    file.check(recipe)
    return Layout.of(
        _KINDS.get(file.fields["distributed_type"], "ddp"),
        ranks=file.processes,
        replicas=file.replicas,
        local_ranks=file.processes // file.machines,
        deepspeed=file.deepspeed_config(recipe),
    )


def _check_model_is_here(recipe: Recipe) -> None:
    name = recipe.model.init_from
    try:
        loading.resolve(name, recipe.model.revision)
    except ValueError:
        if Path(name).exists() or not loading.is_hub_id(name):
            raise
        raise ValueError(
            f"model.init_from: {name} has not been downloaded to this machine; its config.json alone will do, in a "
            "directory of its own: --model.init_from DIRECTORY"
        ) from None


def _fillable(memory: float | None, layout: Layout) -> tuple[int, str]:
    """(bytes that a rank may fill, of what)."""
    if memory is not None:
        return usable(memory * 1e9), f"{memory:g} GB a device"
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return usable(total), f"{gigabytes(total)} of this machine's {torch.cuda.get_device_name(0)}"
    return usable_memory(torch.device("cpu"), layout.local_ranks), "its share of this machine, which has no GPU"


def _print_parts(parts: Parts) -> None:
    for name, title in _NAMES.items():
        print(f"  {title:20}{gigabytes(getattr(parts, name)):>12}")
