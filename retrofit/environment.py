"""What a run ran on: versions, hardware, source revision and command line, but no environment variables or tokens."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from retrofit.credentials import mask_tokens

PACKAGES = (
    "retrofit", "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "deepspeed",
    "numpy", "pydantic", "ruamel.yaml", "flash-attn", "liger-kernel", "lm-eval", "wandb", "trackio", "tensorboard",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """The record that `retrofit env` prints and that each run writes as environment.json.

    Keys: `argv` (tokens masked), `python`, `platform`, `packages` {name: version of those installed},
    `hardware` (see `hardware`), `git` {commit, branch, modified: bool} of this source tree, or None outside a checkout.
    """
    return {
        "argv": [mask_tokens(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages(),
        "hardware": hardware(),
        "git": git_state(Path(__file__)),
    }


def packages() -> dict[str, str]:
    """Versions of the packages that matter here, those that are installed."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> dict[str, Any]:
    """`cpu`, `cpu_count` (cores this process may use), `memory_gib`, `gpus` [{name, memory_gib}], `cuda` or None."""
    import torch

    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_name(),
        "cpu_count": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": [{"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1)} for device in devices],
        "cuda": torch.version.cuda,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def git_state(file: Path) -> dict[str, Any] | None:
    """Commit, branch and whether tracked files are modified, of the repository that tracks `file`; None if none does.

    A package installed under somebody's project lies in that project's repository but is not tracked by it.
    The remote's address is left out: it may hold a password.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(file.resolve().parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", file.name)
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "modified": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def format_environment(record: dict[str, Any]) -> str:
    """The record as readable lines, `key  value`."""
    found = record["hardware"]
    gpus = ", ".join(f"{gpu['name']} ({gpu['memory_gib']} GiB)" for gpu in found["gpus"]) or "none"
    git = record["git"]
    state = f"{git['commit']} on {git['branch']}{', modified' if git['modified'] else ''}" if git else "not a checkout"
    rows = [("python", record["python"]), ("platform", record["platform"]), *record["packages"].items()]
    rows += [("cpu", f"{found['cpu']}, {found['cpu_count']} cores"), ("memory", f"{found['memory_gib']} GiB")]
    rows += [("gpus", gpus), ("cuda", found["cuda"] or "none"), ("git", state)]
    return "\n".join(f"{key:<14}{value}" for key, value in rows)
