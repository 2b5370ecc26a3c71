"""Launches test jobs and reads what is left of their runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from retrofit.checkpoints import checkpoint
from retrofit.training.memory import LiveBytes


class LiveBytesWithResizing(LiveBytes):
    """FSDP2 frees and fills storages by resizing them, which no operation shows."""

    def __enter__(self) -> LiveBytesWithResizing:
        self._resize = resize = torch.UntypedStorage.resize_

        def resize_and_count(storage: torch.UntypedStorage, size: int) -> Any:
            result, key = resize(storage, size), storage._cdata
            if key in self._sizes:
                self.current += storage.nbytes() - self._sizes[key]
                self._sizes[key] = storage.nbytes()
                self.peak = max(self.peak, self.current)
            return result

        torch.UntypedStorage.resize_ = resize_and_count  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)


ROOT = Path(__file__).parents[2]
TIMINGS = (
    "documents_per_second", "tokens_per_second", "tflops_per_second", "seconds_per_step", "seconds_waiting",
    "seconds_saving", "peak_memory_gb",
)  # fmt: skip


def launch(engine: str, root: Path, names: list[str], processes: int = 2) -> str:
    """Runs `root/NAME.yaml` one after the other under the engine's launch file; returns stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{engine}.yaml",
        f"--num_processes={processes}", f"--main_process_port={port}",
        str(Path(__file__).with_name("launched.py")), str(root / "outcomes"), *(str(root / f"{n}.yaml") for n in names),
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]
    ranks = [json.loads((root / f"outcomes-{rank}.json").read_text()) for rank in range(processes)]
    (root / "outcomes.json").write_text(json.dumps(dict(zip(names, zip(*ranks, strict=True), strict=True))))
    return done.stderr


def outcome(root: Path, name: str) -> list[str]:
    return list(json.loads((root / "outcomes.json").read_text())[name])


def read_log(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]


def state(run: Path, step: int = 6) -> dict[str, torch.Tensor]:
    tensors, _, _ = checkpoint.open_state(run / "checkpoints" / checkpoint.step_name(step))
    return {name: tensors.read(name) for name in tensors.shapes}
