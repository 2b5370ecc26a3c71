"""A source's whole weights, an adapter's factors merged into their base, and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.loading import Source
from retrofit.checkpoints.weights import Weights, write_weights
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_QUIET_BYTES = 10**9  # written in a few seconds
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes of a size such as 5GB (powers of ten) or 5GiB (powers of two).

    Raises:
        ValueError: not a positive number with one of the units KB, MB, GB, KiB, MiB, GiB.
    """
    for unit, factor in _UNITS.items():
        number = text.strip().upper().removesuffix(unit).strip()
        if number != text.strip().upper() and number.replace(".", "", 1).isdecimal() and float(number) > 0:
            return max(1, int(float(number) * factor))
    raise ValueError(f"--shard-size {text}: expected a size such as 5GB or 500MB")


def whole(source: Source, dtype: torch.dtype | None, without: tuple[str, ...] = ()) -> tuple[Any, Weights]:
    """The model of a source on the meta device, without factors, and its weights, merged when they are read.

    Factors are merged in float32, one tensor at a time (`adapters.merge`), and rounded once. All weights are of one
    dtype.

    Args:
        dtype: of the weights; None keeps the backbone's own.
        without: top-level modules to leave out.

    Raises:
        ValueError: the files or the tokenizer do not fit together, or the base is not what the adapter was trained on.
    """
    config = loading.model_config(source)
    if loading.tokenizer_directory(source) is None:
        print(f"note      {source.name} has no tokenizer, so the folder gets none", file=sys.stderr)
    else:
        loading.load_tokenizer(source)  # refuses one that does not fit the model
    if source.adapter is not None:
        _check_base(source, config)
    model, readers = loading.build(source, config, dtype=dtype)
    backbone = model.get_input_embeddings().weight.dtype
    readers = adapters.merged_readers(model, readers, as_read=True)
    adapters.merge_into_base(model)
    for name in without:
        model._modules.pop(name, None)
    model.to(backbone)  # new modules too, which are float32 beside factors
    config.dtype = backbone
    config.architectures = [type(model).__name__]
    return model, Weights(model, {name: readers[name] for name, _ in model.named_parameters()})


def _check_base(source: Source, config: LLaDAConfig) -> None:
    """Refuses another base than the adapter was trained on, as far as is recorded."""
    base = loading.base_of(source)
    stated = getattr(config, "base_revision", None)
    # Where the base is a FlexMDM, the revision is that of what it was made of.
    if stated and base.revision not in (None, stated) and not isinstance(loading.model_config(base), FlexMDMConfig):
        raise ValueError(
            f"{source.adapter}: {adapters.CONFIG_FILE} has the base {base.name} at revision {base.revision}, "
            f"config.json at {stated}, which it was trained on; set `revision` in {adapters.CONFIG_FILE} to that"
        )
    recorded = _recorded_base_digest(source.directory)
    if recorded is None:
        return
    print(f"checking  {base.name}: is it what the adapter was trained on?", file=sys.stderr, flush=True)
    if (found := base.digest()) != recorded:
        raise ValueError(
            f"{base.name}: is not what {source.directory} was trained on (its digest is {found}, the run recorded "
            f"{recorded}); put the right base there"
        )


def _recorded_base_digest(directory: Path) -> str | None:
    """What a run recorded of its adapter's base, in a checkpoint, or for final/ in the newest one beside it."""
    steps = checkpoint.steps_present(directory.parent / "checkpoints") if directory.name == "final" else []
    for place in (directory, *reversed(steps)):
        with suppress(OSError, ValueError):  # none there, or a broken one: the next will do
            recorded = checkpoint.read_record(place).get("base_digest")
            return None if recorded is None else str(recorded)
    return None


@contextmanager
def new_directory(dest: Path) -> Iterator[Path]:
    """A directory to write into, beside `dest`, that becomes `dest` at the end if nothing went wrong.

    Raises:
        ValueError: dest is there already.
        OSError: it could not be written. Nothing of it is left.
    """
    refuse_existing(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    temporary = dest.parent / f"{checkpoint.TEMPORARY}{dest.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            checkpoint.sync(path)
        refuse_existing(dest)
        temporary.rename(dest)
        checkpoint.sync(dest.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def refuse_existing(dest: Path) -> None:
    """Refuses a destination where something stands (ValueError)."""
    if dest.exists() or dest.is_symlink():
        raise ValueError(f"{dest}: exists already and is not overwritten; choose another destination")


def write_whole(directory: Path, weights: Weights, shard_size: int) -> None:
    """Writes weights in shards, one tensor in memory at a time. If there is much of it, a line a shard on stderr.

    Raises:
        ValueError: the disk has no room for them.
    """
    total = sum(weights.sizes.values())
    free = shutil.disk_usage(directory).free
    if free < total:
        raise ValueError(f"{directory.parent}: {total / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
    written = 0

    def on_file(path: Path) -> None:
        nonlocal written
        written += path.stat().st_size
        if total > _QUIET_BYTES:
            print(f"writing   {path.name}: {written / 1e9:.2f} of {total / 1e9:.2f} GB", file=sys.stderr, flush=True)

    write_weights(directory, weights, shard_size, on_file)


@contextmanager
def held(source: Source) -> Iterator[None]:
    """While it lasts, no run rotates the source's directories away."""
    with ExitStack() as stack:
        for directory in loading.directories(source):
            stack.enter_context(checkpoint.reading(directory))
        yield
