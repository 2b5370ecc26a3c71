"""Writing files with their SHA-256 taken on the way: safetensors, block by block, and small ones.

safetensors' own writer gives no sight of the bytes, so that hashing would read them all again.
Format: https://huggingface.co/docs/safetensors (8 bytes of header length, a JSON header, the tensors' bytes).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

BLOCK = 4 << 20
_ALIGNMENT = 64

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    on_block: Callable[[], None] = lambda: None,
    read: Callable[[str], Tensor] | None = None,
) -> str:
    """Writes a safetensors file and flushes it to disk.

    Args:
        tensors: contiguous, on the CPU; or, with `read`, of any device, for their shapes and dtypes alone.
        on_block: called before each block of a few MiB is written.
        read: gives each tensor when its turn has come, so that one at a time is in memory.

    Returns:
        the file's SHA-256.

    Raises:
        OSError: it cannot be written; it has the file's name.
    """
    # Widest items first: each tensor then starts at a multiple of its item's size, and the data at one of 64 bytes.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        shape = list(tensor.shape)
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)

    def blocks() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield from _blocks_of(tensors[name] if read is None else read(name))

    return _write(path, blocks(), on_block)


def _blocks_of(tensor: Tensor) -> Iterator[memoryview]:
    if tensor.numel():
        raw = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
        for start in range(0, len(raw), BLOCK):
            yield raw[start : start + BLOCK]


def write_bytes(path: Path, content: bytes, on_block: Callable[[], None] = lambda: None) -> str:
    """Writes a small file and flushes it to disk; returns its SHA-256."""
    return _write(path, iter([content]), on_block)


def _write(path: Path, blocks: Iterator[bytes | memoryview], on_block: Callable[[], None]) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "wb") as file:
            for block in blocks:
                on_block()
                file.write(block)
                digest.update(block)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # neither write nor fsync knows it
        raise
    return digest.hexdigest()
