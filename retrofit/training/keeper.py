"""What a run keeps: its training state collected from the engine, saved beside training, and put back.

Every rank takes part in reading the state of a sharded model, tensor by tensor, and copies those that are its share to
the CPU: at any time it holds one whole tensor more than it keeps. Writing and hashing go on in a thread.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from retrofit.checkpoints import checkpoint
from retrofit.checkpoints.saving import Content, Outcome, Saver
from retrofit.checkpoints.weights import TensorFiles
from retrofit.probe import Probe

from .engines.base import AVERAGE, MASTER, Engine
from .processes import Processes
from .run_directory import RunDirectory
from .start import Start


class NotFiniteError(Exception):
    """A tensor that was to be saved is not finite. The message names the first."""


class Keeper:
    """Saves and restores a run on this rank. All ranks call its methods in the same order.

    Args:
        say: told each save that failed, and what else there is to say; on rank 0.
        alive: called while something else than training takes time.

    Attributes:
        newest: the newest checkpoint that this process knows to be good.
    """

    def __init__(
        self,
        processes: Processes,
        engine: Engine,
        run: RunDirectory,
        begin: Start,
        *,
        rotate: Callable[[Path], None] | None,
        say: Callable[[str], None],
        alive: Callable[[], None],
        probe: Probe,
        time_out: float,
    ) -> None:
        self.processes, self.engine, self.run, self.begin = processes, engine, run, begin
        self.rotate, self.say, self.alive, self.probe = rotate, say, alive, probe
        self.saver = Saver(processes.rank, processes.world_size, probe, time_out)
        self.shares = begin.shares(processes.world_size)
        self.newest: Path | None = None
        self._stall = 0.0
        self._reported: Outcome | None = None
        self._failed_part: str | None = None

    # ---- saving

    def save(self, step: int, record: Mapping[str, Any], rng: Mapping[str, Tensor]) -> None:
        """Copies the state and starts to write checkpoint `step`; a save under way is waited for first.

        Args:
            record: what training_state.json holds besides the world size and Adam's step.
            rng: generator states, written by rank 0.

        Raises:
            NotFiniteError: on all ranks, if a tensor is not finite on any; nothing is written.
        """
        began = time.monotonic()
        self.settle()
        processes = self.processes
        tensors, loadable = self._collect(self.engine.kinds)
        files: dict[str, Content] = {checkpoint.state_file(processes.rank, processes.world_size): tensors}
        files |= self.begin.files(loadable, processes.rank, processes.world_size)
        if processes.is_main:
            whole = {**record, "adam_step": self.engine.adam_step, "world_size": processes.world_size}
            files[checkpoint.STATE_RECORD] = (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()
            if rng:
                files[checkpoint.RNG_TENSORS] = save(dict(rng))
        self.saver.begin(self.run.checkpoints / checkpoint.step_name(step), step, files, then=self.rotate)
        self._stall += time.monotonic() - began

    def take_stall(self) -> float:
        """Seconds that saves have kept training waiting since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    def save_final(self, step: int) -> None:
        """Writes final/, the loadable weights without training state, and waits for it.

        Raises:
            OSError: on rank 0, if it could not be written.
        """
        self.settle()
        kind = self._loadable_kind()
        _, loadable = self._collect((kind,))
        self.saver.begin(
            self.run.final, step, self.begin.files(loadable, self.processes.rank, self.processes.world_size)
        )
        problem = self._wait()
        if problem:
            self.processes.on_main(lambda: _raise(f"{self.run.final}: {problem}"))

    def _loadable_kind(self) -> str:
        return AVERAGE if AVERAGE in self.engine.kinds else MASTER

    def _collect(self, kinds: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(`kind/name` -> this rank's share of the state, name -> the loadable weights that this rank writes)."""
        rank, tensors, loadable = self.processes.rank, {}, {}
        whole_adapter = self.begin.adapter is not None and rank == 0
        infinite: list[str] = []
        for name, _ in self.engine.parameters:
            for kind in kinds:
                tensor = self.engine.read(kind, name)
                is_loadable = kind == self._loadable_kind() and (
                    whole_adapter if self.begin.adapter is not None else self.shares[name] == rank
                )
                if self.shares[name] == rank or is_loadable:
                    copy = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
                    if not copy.isfinite().all():
                        infinite.append(f"{kind}/{name}")
                    if self.shares[name] == rank:
                        tensors[f"{kind}/{name}"] = copy
                    if is_loadable:
                        loadable[name] = copy
            self.alive()
        everywhere = [name for names in self.processes.gather(infinite) for name in names]
        if everywhere:
            raise NotFiniteError(f"{len(everywhere)} tensors are not finite after the update ({everywhere[0]} for one)")
        return tensors, loadable

    def poll(self) -> bool:
        """Reports a save that has ended on rank 0; returns whether this rank's part has failed."""
        outcome = self.saver.poll()
        if outcome is not None:
            if self.processes.is_main:
                self._report(outcome)
            else:
                self._failed_part = outcome.problem
        return self._failed_part is not None

    def settle(self) -> bool:
        """Waits for the save under way, on all ranks; returns whether the newest one that was begun is good."""
        return self._wait() is None

    def _wait(self) -> str | None:
        """The problem of the save under way or last ended, the same on all ranks."""
        main = self.processes.is_main
        if not main:
            outcome = self.saver.wait(self.alive)
            self._failed_part = outcome.problem if outcome is not None else self._failed_part
        problems = self.processes.gather(self._failed_part)
        self._failed_part = None
        if main:
            failed = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
            if failed:
                self.saver.abort(failed[0])
            outcome = self.saver.wait(self.alive)
            if outcome is not None:
                self._report(outcome)
            self.saver.clear()
        last = self._reported
        problem, newest = self.processes.on_main(
            lambda: (last.problem if last else None, str(self.newest) if self.newest else None)
        )
        self.newest = Path(newest) if newest else None
        return problem

    def _report(self, outcome: Outcome) -> None:
        self._reported = outcome
        if outcome.remark:
            self.say(f"after saving {outcome.directory.name}: {outcome.remark}")
        if outcome.problem is None:
            if outcome.directory.parent == self.run.checkpoints:
                self.newest = outcome.directory
            return
        step = checkpoint.step_of(outcome.directory)
        self.say(f"{outcome.directory.name} could not be saved ({outcome.problem}); the run goes on")
        with suppress(OSError):
            self.run.append({"step": step, "kind": "save_failed", "reason": outcome.problem})

    # ---- restoring

    def restore(self, tensors: TensorFiles, adam_step: int) -> None:
        """Puts the engine's state back, whatever engine and number of processes saved it.

        Raises:
            ValueError: a tensor is missing, surplus or misshapen (count and first names).
        """
        engine = self.engine
        shapes = {
            f"{kind}/{name}": tuple(self.begin.weights.shapes[name])
            for kind in engine.kinds
            for name, _ in engine.parameters
        }
        wrong = sorted(
            key for key in shapes.keys() | tensors.shapes.keys() if shapes.get(key) != tensors.shapes.get(key)
        )
        if wrong:
            raise ValueError(
                f"the training state has {len(wrong)} tensors that are missing, surplus or misshapen for this model: "
                f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; does the checkpoint belong to this recipe?"
            )

        def read(kind: str, name: str) -> Tensor:
            self.alive()
            return tensors.read(f"{kind}/{name}")

        engine.restore(read, adam_step)


def _raise(message: str) -> None:
    raise OSError(message)
