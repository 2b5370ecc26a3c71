"""Forks the ranks of small jobs over gloo, each under a watch, and harms one of them. Started by test_watch.

    watched.py DIRECTORY SECONDS NAME...    prints {NAME: {"codes", "seconds" (from harm to the last end), "stderr"}}

A scenario's NAME is HARM-RANK-WORLD-HOST: what is done to which rank of how many in step 3, and which process holds the
store: `launcher` (this one) or `rank0`. Ranks take five steps.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from retrofit.training.watch import Watch, launch_store


def rank_main(name: str, rank: int, directory: Path, limit: float) -> None:
    harm, harmed, world, _ = name.split("-")
    sys.stderr = open(directory / f"{name}-{rank}.txt", "w", buffering=1)  # noqa: SIM115
    world_size = int(world)
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    watch = Watch(
        launch_store(name, world_size),
        rank,
        world_size,
        step_seconds=limit,
        start_seconds=3 * limit,
        directory=directory / name,
        say=lambda text, step: print(f"{step}|{text}", file=sys.stderr),
    )
    watch.newest = Path("run/checkpoints/step-00000002")
    with watch:
        for step in range(1, 6):
            watch.beat(step, "forward")
            if step == 3:
                (directory / f"{name}-{rank}.time").write_text(str(time.time()))
                if rank == int(harmed):
                    do(harm, watch, limit)
            watch.beat(step, "backward")
            if world_size > 1:
                dist.all_reduce(torch.ones(3))
            watch.started()
            time.sleep(limit / 8)  # longer than the watch's pace, so that the others know of each step
    print("done", file=sys.stderr)


def do(harm: str, watch: Watch, limit: float) -> None:
    if harm == "sleep":
        time.sleep(1000)
    elif harm == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif harm == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif harm == "raise":
        raise MemoryError("no memory for the batch")
    elif harm == "work":  # three time-outs long, with signs of life
        for _ in range(12):
            time.sleep(limit / 4)
            watch.alive()
    elif harm == "suspend":  # the whole job, see main
        time.sleep(limit / 2)


def main() -> None:
    directory, limit = Path(sys.argv[1]), float(sys.argv[2])
    torch.set_num_threads(1)
    results = {}
    for name in sys.argv[3:]:
        harm, _, world, host = name.split("-")
        (directory / name).mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(host == "launcher")
        ranks = []
        for rank in range(int(world)):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    rank_main(name, rank, directory, limit)
                    code = 0
                finally:
                    os._exit(code)
            ranks.append(child)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if host == "launcher" else None
        if harm == "suspend":
            marks = [directory / f"{name}-{rank}.time" for rank in range(int(world))]
            while not all(mark.exists() for mark in marks):
                time.sleep(0.01)
            for child in ranks:
                os.kill(child, signal.SIGSTOP)
            time.sleep(3 * limit)
            for child in ranks:
                os.kill(child, signal.SIGCONT)
        codes: dict[int, int] = {}
        while len(codes) < len(ranks):
            for rank, child in enumerate(ranks):
                if rank not in codes:
                    ended, status = os.waitpid(child, os.WNOHANG)
                    if ended:
                        codes[rank] = os.waitstatus_to_exitcode(status)
            if harm == "stop" and len(codes) == len(ranks) - 1:
                break
            time.sleep(0.01)
        ended_at = time.time()
        for rank, child in enumerate(ranks):
            if rank not in codes:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        del store
        results[name] = {
            "codes": [codes.get(rank) for rank in range(len(ranks))],
            "seconds": ended_at - min(float(path.read_text()) for path in directory.glob(f"{name}-*.time")),
            "stderr": [(directory / f"{name}-{rank}.txt").read_text() for rank in range(len(ranks))],
        }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
