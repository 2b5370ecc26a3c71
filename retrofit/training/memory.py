"""How much memory tensors take, and how much there is.

`LiveBytes` counts what torch's operations leave alive: the same on every device, for fake tensors too. What an
allocator adds to it (rounding, fragments) and what kernels take for themselves is left to a reserve.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

RESERVE = 0.1
"""Fraction of a device's memory that is left alone: for the communication library's buffers, kernels' workspaces, and
what the allocator loses in fragments. An estimate; on a CPU also for the process itself and what else runs."""


class LiveBytes(TorchDispatchMode):
    """While it is entered, counts the bytes of all storages that operations return, for as long as they live.

    A storage counts once, however many tensors share it (views, what autograd has saved), and leaves when the last of
    them goes. What was there before counts once it is given to `count`, or an operation returns a view of it. Not seen:
    what a kernel allocates and frees within itself, and storages resized from Python.

    Args:
        device: type of the device whose tensors count; of a fake tensor, the device that it stands for.

    Example:
        with LiveBytes("cpu") as live:
            loss(model, batch).backward()
        print(live.peak)

    Attributes:
        current: bytes alive now. peak: most bytes alive at a time, after an operation.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.current = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, tensors: Iterable[Tensor]) -> int:
        """Counts these tensors' storages from now on; returns how many bytes are new."""
        before = self.current
        for tensor in tensors:
            self._count(tensor)
        self.peak = max(self.peak, self.current)
        return self.current - before

    def _count(self, tensor: Tensor) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor  # its own storage has a size and no memory
        if tensor.device.type != self.device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._sizes:
            # torch keeps a storage's Python object for as long as the storage itself.
            self._references[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))  # type: ignore[misc]
        self.current += size - self._sizes.get(key, 0)
        self._sizes[key] = size

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.current -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, Tensor):
                self._count(value)
        self.peak = max(self.peak, self.current)
        return out


def usable_memory(device: torch.device, local_ranks: int = 1) -> int:
    """Bytes that one rank may fill: what is free on its device, at most all but the reserve.

    On a CPU the machine's memory, or what the process's control groups allow if that is less, is shared by the ranks
    on it.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free, usable(total))
    memory = psutil.virtual_memory()
    limits = control_group_limits()
    total = min([memory.total, *(limit for limit, _ in limits)])
    free = min([memory.available, *(limit - used for limit, used in limits)])
    return min(free, usable(total)) // local_ranks


def usable(total: float) -> int:
    """Bytes of a device's `total` that may be filled."""
    return int(total * (1 - RESERVE))


def control_group_limits(
    root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) in bytes of each control group (version 2, or 1) of this process that limits memory.

    Files that are only cached do not count as used: they give way.
    """
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == "":
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = top / path.lstrip("/")
        # In a container the path may be the host's, and the mounted root the group's own.
        for folder in {here, *here.parents, top}:
            if folder == top or top in folder.parents:
                found += _limit_of(folder, *names)
    return found


def _limit_of(folder: Path, limit: str, used: str, cached: str) -> list[tuple[int, int]]:
    try:
        most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [] if most == "max" else [(int(most), now - int(fields.get(cached, 0)))]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory, on a GPU or a CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
