"""Runs recipes one after the other, as one rank of a launched job. Started by test_two_ranks.

    launched.py OUTCOMES RECIPE...     writes OUTCOMES-RANK.json: for each "complete", "exit N" or "refused: why"

What a recipe's file is called decides what is done to its run:
    *-copy        starts as what the run before it would have been, killed after its first checkpoint
    *-signalled   rank 1 alone gets SIGUSR1 in the third step
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch

    from retrofit.checkpoints.checkpoint import steps_present
    from retrofit.recipe import load_recipe
    from retrofit.training.engine import Engine
    from retrofit.training.loop import Trainer, train

    torch.set_num_threads(1)
    Engine.close = lambda self: None  # type: ignore[method-assign]  # the process group serves all recipes
    rank, take_step = int(os.environ["RANK"]), Trainer.take_step
    previous = Path()

    def signalled(trainer: Trainer, batches: Any) -> bool:
        if rank == 1 and trainer.step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take_step(trainer, batches)

    outcomes = []
    for path in map(Path, sys.argv[2:]):
        recipe = load_recipe(path)
        run = Path(recipe.training.output_dir)
        setattr(Trainer, "take_step", signalled if path.stem.endswith("-signalled") else take_step)  # noqa: B010
        if path.stem.endswith("-copy"):
            if rank == 0:
                shutil.copytree(previous, run)
                shutil.rmtree(run / "final")
                for step in steps_present(run / "checkpoints")[1:]:
                    shutil.rmtree(step)
            torch.distributed.barrier()
        try:
            train(recipe)
            outcomes.append("complete")
        except SystemExit as stop:
            outcomes.append(f"exit {stop.code}")
        except ValueError as error:
            outcomes.append(f"refused: {error}")
        previous = run
    Path(f"{sys.argv[1]}-{rank}.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
