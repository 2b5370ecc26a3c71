"""Named points of a run, at which a test may do harm.

The run calls its probe as it passes a point; outside tests the probe does nothing. Tests hand in one that kills, hangs,
raises or spoils a tensor at a chosen rank, step and point, so that no fault has to be patched into the code.
"""

from __future__ import annotations

from typing import Any, Protocol


class Probe(Protocol):
    """Called as `probe(where, step, subject)`: the point's name, the step under way (from 1), and what is worked on."""

    def __call__(self, where: str, step: int, subject: Any = None) -> None: ...


def no_probe(where: str, step: int, subject: Any = None) -> None:
    """Does nothing."""
