"""The progress line on the terminal and the trackers of `report_to`. `log.jsonl` itself is the run directory's."""

from __future__ import annotations

import importlib.util
import netrc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

LINE_SECONDS = 30.0
"""Shortest time between lines of a kind where stderr is a file. Everything is in log.jsonl and samples.jsonl anyway."""


class Progress:
    """Shows step, loss terms, speed and time left: one line that rewrites itself on a terminal, few lines in a file.

    Args:
        first_step: the step (from 0) that this process starts at; speed and time left count from there.
    """

    def __init__(self, first_step: int, max_steps: int, stream: TextIO | None = None) -> None:
        self.max_steps = max_steps
        self.stream = stream or sys.stderr
        self.is_terminal = self.stream.isatty()
        self._first_step = first_step
        self._started = time.monotonic()
        self._shown_at: dict[str, float] = {}
        self._width = 0

    def seconds_left(self, step: int) -> float:
        """Estimated seconds until the last step, from the mean time a step has taken."""
        done = max(1, step - self._first_step)
        return (time.monotonic() - self._started) / done * (self.max_steps - step)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a training record of the log, unless it would spam a file."""
        if not self._is_due("train", record["step"]):
            return
        text = self.describe(record)
        if self.is_terminal:
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def note(self, kind: str, step: int, text: str) -> None:
        """A line of its own about something that recurs, unless it would spam a file."""
        if self._is_due(kind, step):
            self.say(f"step {step}, {kind}: {text}")

    def _is_due(self, kind: str, step: int) -> bool:
        """On a terminal always; in a file at most every LINE_SECONDS for each kind, and at the last step."""
        now = time.monotonic()
        due = (
            self.is_terminal or step == self.max_steps or now - self._shown_at.get(kind, -LINE_SECONDS) >= LINE_SECONDS
        )
        if due:
            self._shown_at[kind] = now
        return due

    def describe(self, record: Mapping[str, Any]) -> str:
        mfu = "" if record["mfu"] is None else f"{record['mfu']:.0%} MFU  "
        return (
            f"step {record['step']}/{self.max_steps}  {describe_loss(record)}  "
            f"norm {record['gradient_norm']:.3g}  {record['tokens_per_second']:,.0f} tokens/s  {mfu}"
            f"{format_seconds(self.seconds_left(record['step']))} left"
        )

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.is_terminal and self._width:
            self.stream.write("\n")
            self._width = 0
        self.stream.write(text + "\n")
        self.stream.flush()

    def close(self) -> None:
        if self.is_terminal and self._width:
            self.stream.write("\n")


def describe_loss(record: Mapping[str, Any]) -> str:
    """`loss 1.23 (unmasking 1, insertion 0.23)`; a plain masked-diffusion model has one term only."""
    terms = ", ".join(f"{name} {record[name]:.4g}" for name in ("unmasking", "insertion") if name in record)
    return f"loss {record['loss']:.4g} ({terms})"


def format_seconds(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


# ------------------------------------------------------------------------------------------------------------- trackers


class Tracker(Protocol):
    """What a tracker has to do."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuses a tracker that is not installed or has no key (ValueError), before anything slow. Never asks or waits."""
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(
                f"training.report_to: {name} is not installed; pip install {_PACKAGES[name]}, or remove it "
                "(log.jsonl is written in any case)"
            )
        if name == "wandb" and not _has_wandb_key():
            raise ValueError(
                "training.report_to: wandb has no key; set WANDB_API_KEY or WANDB_MODE=offline, or remove it"
            )


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def open_trackers(names: Sequence[str], directory: Path, recipe: Mapping[str, Any]) -> list[Tracker]:
    """Opens trackers that write beside the run, each under the run directory's name."""
    makers: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
        "tensorboard": _TensorBoard,
        "wandb": _Wandb,
        "trackio": _Trackio,
    }
    return [makers[name](directory, recipe) for name in names]


class _TensorBoard:
    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project="retrofit", name=directory.name, dir=str(directory), config=dict(recipe))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    def __init__(self, directory: Path, recipe: Mapping[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="retrofit", name=directory.name, config=dict(recipe))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self.trackio.log(dict(values), step=step)

    def close(self) -> None:
        self.trackio.finish()
