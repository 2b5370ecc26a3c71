"""Runs recipes one after the other, as one rank of a launched job. Started by test_two_ranks and test_engines.

    launched.py OUTCOMES RECIPE...     writes OUTCOMES-RANK.json: for each "complete", "exit N" or "refused: why"

On a CPU accelerate takes its DeepSpeed and FSDP branches only where it believes in a GPU, and gloo only where it does
not; `install_shim` tells it both. It also keeps DeepSpeed from compiling a shared-memory kernel that is not needed.

What a recipe's file is called decides what is done to its run:
    *-copy        starts as what the run before it would have been, killed after its first checkpoint
    *-from-NAME   the same, of the run NAME beside it
    *-signalled   rank 1 alone gets SIGUSR1 in the third step; *-signalled7: in the seventh, in its second micro-batch
    *-hanging     rank 1 sleeps for ever in step 3; *-killed: it is killed there
    *-poisoned    rank 1's loss in step 3 is NaN
    *-diskfull    rank 1 finds the disk full while it writes step 4
    *-tight       all ranks run out of memory in the first trial of a token budget; *-tight1: rank 1 alone does.
                  OUTCOMES-RANK.json says of the former the most bytes of live tensors before the first step
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def install_shim() -> None:
    import deepspeed.comm.torch
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = PartialState._prepare_backend

    def prepare_backend(self: Any, cpu: bool, sagemaker_dp: bool = False, backend: str | None = None) -> Any:
        if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
            return "gloo", DistributedType.MULTI_CPU
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            return "gloo", DistributedType.MULTI_GPU
        return original(self, cpu, sagemaker_dp, backend)

    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]
    deepspeed.comm.torch.build_shm_op = lambda: None
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"


def main() -> None:
    import torch

    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        install_shim()

    from retrofit.checkpoints.checkpoint import steps_present
    from retrofit.flexmdm.llada import LLaDAPreTrainedModel
    from retrofit.probe import Probe, no_probe
    from retrofit.recipe import Recipe, load_recipe
    from retrofit.training.loop import train
    from retrofit.training.processes import Processes
    from tests.faults import both, disk_full, fail_at, hang, kill, out_of_memory, send, spoil
    from tests.training.runs import LiveBytesWithResizing

    def peak_of(recipe: Recipe, probe: Probe) -> int:
        """Trains, and gives the most bytes of live tensors before the first step."""
        peaks: list[int] = []
        with LiveBytesWithResizing("cpu") as live:
            train(recipe, probe=both(probe, fail_at(None, 1, "start", lambda _: peaks.append(live.peak))))
        return peaks[0]

    torch.set_num_threads(1)
    # A backend that traces as every other does, and generates no code.
    LLaDAPreTrainedModel.compile_blocks = functools.partialmethod(LLaDAPreTrainedModel.compile_blocks, "aot_eager")  # type: ignore[assignment]
    Processes.close = lambda self: None  # type: ignore[method-assign]  # the process group serves all recipes
    rank = int(os.environ["RANK"])
    probes = {
        "signalled": fail_at(1, 3, "forward", send(signal.SIGUSR1)),
        "hanging": fail_at(1, 3, "forward", hang),
        "killed": fail_at(1, 3, "forward", kill),
        "poisoned": fail_at(1, 3, "forward", spoil),
        "diskfull": fail_at(1, 4, "save.block", disk_full),
        "tight": fail_at(None, 1, "trial forward", out_of_memory),
        "tight1": fail_at(1, 1, "trial backward", out_of_memory),
    }
    previous = Path()

    outcomes = []
    for path in map(Path, sys.argv[2:]):
        recipe = load_recipe(path)
        torch._dynamo.reset()
        run = Path(recipe.training.output_dir)
        found = re.search(r"-from-(\S+)$", path.stem)
        if path.stem.endswith("-copy") or found:
            if rank == 0:
                shutil.copytree(run.parent / found.group(1) if found else previous, run)
                shutil.rmtree(run / "final")
                for step in steps_present(run / "checkpoints")[1:]:
                    shutil.rmtree(step)
            torch.distributed.barrier()
        probe = next((probes[name] for name in probes if path.stem.endswith(f"-{name}")), no_probe)
        if signalled := re.search(r"-signalled(\d+)$", path.stem):
            probe = fail_at(1, int(signalled.group(1)), "forward", send(signal.SIGUSR1), after=1)
        try:
            if path.stem.endswith("-tight"):
                outcomes.append(f"complete, {peak_of(recipe, probe)} bytes")
            else:
                train(recipe, probe=probe)
                outcomes.append("complete")
        except SystemExit as stop:
            outcomes.append(f"exit {stop.code}")
        except ValueError as error:
            outcomes.append(f"refused: {error}")
        previous = run
    Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(outcomes))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # left to the interpreter's end, its threads may abort the process


if __name__ == "__main__":
    main()
