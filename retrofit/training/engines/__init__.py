"""One engine for each way of spreading a model over processes, behind one interface (`base.Engine`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..processes import Processes
from .base import Engine


def make_engine(processes: Processes, *, bf16: bool, average: bool, deepspeed: Mapping[str, Any] | None) -> Engine:
    """The engine that the launcher's config asks for.

    Args:
        deepspeed: the resolved DeepSpeed configuration, where the launcher brought one.
    """
    if processes.kind == "fsdp":
        from .fsdp import FullyShardedEngine

        return FullyShardedEngine(processes, bf16=bf16, average=average)
    if processes.kind == "zero":
        from .zero import ZeroOneTwoEngine, ZeroThreeEngine

        assert deepspeed is not None
        stage = deepspeed["zero_optimization"]["stage"]
        engine = ZeroThreeEngine if stage == 3 else ZeroOneTwoEngine
        return engine(processes, deepspeed, bf16=bf16, average=average)
    from .replicated import ReplicatedEngine

    return ReplicatedEngine(processes, bf16=bf16, average=average)
