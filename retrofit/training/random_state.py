"""The generators that dropout draws from, of every rank: part of a checkpoint, since dropout is not keyed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .processes import Processes


def random_states(processes: Processes) -> dict[str, Tensor]:
    """`rank-00000/cpu` (and `/cuda`) -> uint8 state of the generators of all ranks."""
    states = {"cpu": torch.get_rng_state()}
    if processes.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(processes.device)
    return {
        f"rank-{rank:05d}/{kind}": tensor
        for rank, theirs in enumerate(processes.gather(states))
        for kind, tensor in theirs.items()
    }


def restore_random_states(processes: Processes, states: Mapping[str, Tensor]) -> bool:
    """Sets this rank's generators; False if the states are of another number of ranks or kind of device."""
    saved = len({key.partition("/")[0] for key in states})
    prefix = f"rank-{processes.rank:05d}/"
    mine = {key.removeprefix(prefix): state for key, state in states.items() if key.startswith(prefix)}
    if saved != processes.world_size or ("cuda" in mine) != (processes.device.type == "cuda"):
        return False
    torch.set_rng_state(mine["cpu"])
    if "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], processes.device)
    return True
