"""Weights by name: read when they are asked for, drawn where they are fresh, shared out over ranks, put into files.

Training builds its model on the meta device, where parameters have shapes and no memory. A `Readers` says where each
parameter's values are to be had; nobody has to hold more of a model than what is in hand.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from retrofit.flexmdm.llada import check_weight_files, refuse_misfits

from .tensor_file import write_tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

Readers = dict[str, Callable[[], Tensor]]
"""Parameter's name -> what reads or computes it: on the CPU, contiguous, in memory of its own, whole."""

Files = dict[str, Mapping[str, Tensor] | bytes]
"""Path within a directory -> the tensors of a safetensors file, or the content of any other file."""


# -------------------------------------------------------------------------------------------------------------- reading


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorFiles:
    """The tensors of one or several safetensors files, by name. No file is kept open.

    Attributes:
        shapes, dtypes: of every tensor.

    Raises:
        ValueError: a file is not readable, or two files hold a tensor of the same name.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._paths: dict[str, Path] = {}
        for path in paths:
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    if name in self._paths:
                        raise ValueError(f"{path}: holds {name}, as {self._paths[name].name} does; remove one of them")
                    self._paths[name] = path
                    described = file.get_slice(name)
                    self.shapes[name] = tuple(described.get_shape())
                    if described.get_dtype() not in _DTYPES:
                        raise ValueError(
                            f"{path}: {name} is of type {described.get_dtype()}; known are {', '.join(_DTYPES)}"
                        )
                    self.dtypes[name] = _DTYPES[described.get_dtype()]

    def read(self, name: str) -> Tensor:
        """One tensor.

        safetensors maps tensors as they lie in the file, at any multiple of 4 bytes, and matrix products on a CPU
        depend on the alignment in their last bits: in memory of its own, the same weights from two files train alike.
        """
        with _opened(self._paths[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone(memory_format=torch.contiguous_format)


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error}); incomplete copy or download?") from error


def weight_files(directory: Path) -> list[Path]:
    """The files of full weights in a directory: model.safetensors, else the shards that the index names.

    Raises:
        ValueError: there are none, the index is not readable, or a shard is missing.
    """
    check_weight_files(directory)
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    return [directory / shard for shard in sorted(set(index["weight_map"].values()))]


def full_readers(model: nn.Module, directory: Path, files: TensorFiles, fresh: tuple[str, ...] = ()) -> Readers:
    """Readers of a model's parameters from full weights.

    Args:
        directory: where the files are, for messages.
        fresh: names of top-level modules that the files shall hold nothing of; they get no readers.

    Raises:
        ValueError: a tensor is missing, surplus or misshapen (named).
    """
    ours = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    expected = {name: shape for name, shape in ours.items() if name.split(".")[0] not in fresh}
    refuse_misfits(
        directory,
        type(model).__name__,
        missing=expected.keys() - files.shapes.keys(),
        surplus=files.shapes.keys() - expected.keys(),
        misshapen=[
            f"{name} {list(files.shapes[name])} for {list(shape)}"
            for name, shape in expected.items()
            if name in files.shapes and files.shapes[name] != shape
        ],
    )
    return {name: partial(files.read, name) for name in expected}


class Weights:
    """A model's parameters by name: what they are is known, their values are read when they are asked for.

    Args:
        model: its parameters' names, shapes and dtypes count, as they are now.
        readers: one for each parameter.

    Attributes:
        shapes, dtypes: of every parameter.
    """

    def __init__(self, model: nn.Module, readers: Readers) -> None:
        parameters = dict(model.named_parameters())
        if parameters.keys() != readers.keys():
            raise RuntimeError(f"no reader, or no parameter: {sorted(parameters.keys() ^ readers.keys())[:4]}")
        self._readers = readers
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.dtypes = {name: parameter.dtype for name, parameter in parameters.items()}

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of every parameter."""
        return {name: shape.numel() * self.dtypes[name].itemsize for name, shape in self.shapes.items()}

    def read(self, name: str) -> Tensor:
        """All of a parameter's values, on the CPU, in its dtype, contiguous, in memory of their own."""
        return self._readers[name]().to(self.dtypes[name])


# ---------------------------------------------------------------------------------------------------------------- fresh


def fresh_reader(
    module: nn.Module, parameter: str, key: str, seed: int, draw: Callable[[nn.Module], None]
) -> Callable[[], Tensor]:
    """A reader of a parameter's starting value: a function of (seed, key) and of its module's kind and shape alone.

    It is drawn in float32 on the CPU, by itself: what else is drawn, in which order and by whom makes no difference.

    Args:
        module: on the meta device. A copy is kept, so whatever becomes of it makes no difference either.
        parameter: the parameter's name within the module.
        draw: initialises a module in place from torch's global generator, whose state is restored.
    """
    kept = copy.deepcopy(module)
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    path, _, last = parameter.rpartition(".")

    def read() -> Tensor:
        drawn = copy.deepcopy(kept)
        values = torch.full(kept.get_parameter(parameter).shape, torch.nan)
        drawn.get_submodule(path)._parameters[last] = nn.Parameter(values, requires_grad=False)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big"))
            draw(drawn)  # draws nothing for the parameters that are still on the meta device
        if values.isnan().any():
            raise RuntimeError(f"{key}: {type(module).__name__} does not say how it starts")
        return values

    return read


# --------------------------------------------------------------------------------------------------------- into a model


def materialise(
    model: nn.Module, read: Callable[[str], Tensor], on_leaf: Callable[[nn.Module], object] | None = None
) -> None:
    """Gives the parameters that are on the meta device their values, module by module, on the CPU.

    Args:
        read: parameter's name -> its values. A parameter that two modules share is read once, by its first name.
        on_leaf: called with each module that owns parameters, once they are real. It may move or cut them up: the
            memory needed is then that of one module and of what is left of those before.
    """
    shared: dict[int, nn.Parameter] = {}
    meta: list[nn.Parameter] = []  # kept, so that no id in `shared` is given out again
    for path, module in list(model.named_modules()):
        filled = False
        for last, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in shared:
                values = read(f"{path}.{last}" if path else last)
                shared[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                meta.append(parameter)
            module._parameters[last] = shared[id(parameter)]
            filled = True
        if filled and on_leaf is not None:
            on_leaf(module)


# ----------------------------------------------------------------------------------------------------------- into files


def share_of(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank is to write each tensor: largest first, each to the rank with the least so far.

    A function of names and sizes alone, so that all ranks agree without asking.

    Args:
        sizes: name -> bytes (or any other measure).

    Returns:
        name -> rank, in the order of `sizes`.
    """
    loads = [0] * world_size
    ranks: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        rank = min(range(world_size), key=loads.__getitem__)
        loads[rank] += sizes[name]
        ranks[name] = rank
    return {name: ranks[name] for name in sizes}


def shard_name(number: int, count: int) -> str:
    """`model-00001-of-00004.safetensors` for number 1 of 4; model.safetensors for the only one."""
    return WEIGHTS_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index(shards: Mapping[str, str], total_bytes: int) -> bytes:
    """The index of sharded weights, as transformers reads it.

    Args:
        shards: tensor's name -> file.
    """
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shards.items()))}
    return (json.dumps(content, indent=2) + "\n").encode()


def write_files(directory: Path, files: Files) -> None:
    """Writes files into an existing directory, folders made as needed."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            cpu = {key: tensor.detach().contiguous().cpu() for key, tensor in content.items()}
            write_tensors(path, cpu)


def write_weights(
    directory: Path, weights: Weights, most: int = 2 << 30, on_file: Callable[[Path], None] = lambda path: None
) -> None:
    """Writes full weights, in one file or in shards. One tensor at a time is in memory.

    Args:
        most: bytes of a shard, unless it is of one larger tensor.
        on_file: called with each file of weights that was written.
    """
    shards: list[list[str]] = []
    room = 0
    for name, size in weights.sizes.items():
        if size > room or not shards:
            shards.append([])
            room = most
        shards[-1].append(name)
        room -= size
    names = [shard_name(number + 1, len(shards)) for number in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        described = {
            name: torch.empty(weights.shapes[name], dtype=weights.dtypes[name], device="meta") for name in shard
        }
        write_tensors(directory / file, described, read=weights.read)
        on_file(directory / file)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        write_files(directory, {INDEX_FILE: index(where, sum(weights.sizes.values()))})
