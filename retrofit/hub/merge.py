"""`retrofit merge`: an adapter and its base as one directory of whole weights."""

from __future__ import annotations

from pathlib import Path

from retrofit.checkpoints import checkpoint, loading
from retrofit.checkpoints.weights import write_files

from .whole import DTYPES, held, parse_size, refuse_existing, whole, write_whole


def merge(
    path: str, dest: Path, *, revision: str | None = None, shard_size: str = "5GB", dtype: str | None = None
) -> None:
    """Writes the whole weights that an adapter and its base make, with config.json, tokenizer and manifest.

    Each merged weight is W + alpha / r B A taken in float32 and rounded once to the dtype that is written. One tensor
    is in memory at a time.

    Args:
        path: see `loading.resolve`.
        dest: must not exist; it appears when it is complete.
        dtype: a name of DTYPES; None keeps the base's.

    Raises:
        ValueError: there is no adapter, it does not fit its base, or dest exists.
    """
    refuse_existing(dest)
    most = parse_size(shard_size)
    source = loading.resolve(path, revision)
    if source.adapter is None:
        raise ValueError(f"{path}: holds whole weights already, nothing is to be merged; see `retrofit export`")
    with held(source):
        model, weights = whole(source, None if dtype is None else DTYPES[dtype])

        def write(directory: Path) -> None:
            write_whole(directory, weights, most)
            config = model.config.to_json_string(use_diff=True).encode()
            write_files(directory, {"config.json": config, **loading.tokenizer_files(source)})

        checkpoint.write_directory(dest, write)
    print(f"written   {dest}: whole weights, {model.config.dtype}".replace("torch.", ""))
