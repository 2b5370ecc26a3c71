from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retrofit.checkpoints.weights import (
    TensorFiles,
    Weights,
    fresh_reader,
    index,
    materialise,
    shard_name,
    share_of,
    weight_files,
    write_weights,
)


class Toy(nn.Module):
    """Two linear maps, the second's weight shared with the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.zeros(2), requires_grad=False)


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def counted(name: str) -> Tensor:
    """Values that tell the name."""
    shape = {"weight": (3, 3), "bias": (3,), "frozen": (2,)}[name.rpartition(".")[2]]
    return torch.full(shape, float(sum(name.encode())))


# -------------------------------------------------------------------------------------------------------------- reading


def test_tensors_are_read_by_name_over_several_files_into_aligned_memory_of_their_own(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3),
        "b": torch.randn(5, 2).to(torch.bfloat16),
        "c": torch.randn(1, dtype=torch.float64),
        "d": torch.randn(7),
    }
    save_file({name: tensors[name] for name in "ab"}, tmp_path / "1")
    save_file({name: tensors[name] for name in "cd"}, tmp_path / "2")
    files = TensorFiles([tmp_path / "1", tmp_path / "2"])
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert files.dtypes == {name: tensor.dtype for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        read, again = files.read(name), files.read(name)
        assert torch.equal(read, tensor) and read.dtype == tensor.dtype
        assert read.data_ptr() % 64 == 0 and read.data_ptr() != again.data_ptr()
    before = files.read("a")
    (tmp_path / "1").write_bytes(b"\0" * (tmp_path / "1").stat().st_size)
    assert torch.equal(before, tensors["a"])  # no view of the file


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_file_that_is_no_safetensors_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(9)}, path)
    path.write_bytes({"cut": path.read_bytes()[:-1], "empty": b"", "text": b"version https://git-lfs"}[damage])
    with pytest.raises(ValueError, match=r"x.safetensors: not a readable safetensors file .*incomplete copy"):
        TensorFiles([path])


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("1", "2"):
        save_file({"a": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(ValueError, match="2: holds a, as 1 does"):
        TensorFiles([tmp_path / "1", tmp_path / "2"])


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1, dtype=torch.int8)}, tmp_path / "1")
    with pytest.raises(ValueError, match="a is of type I8; known are F64, F32, F16, BF16"):
        TensorFiles([tmp_path / "1"])


def test_no_file_stays_open(tmp_path: Path) -> None:
    """Or the space of a checkpoint that was resumed and then rotated away would not come back."""
    save_file({"a": torch.zeros(4)}, tmp_path / "1")
    files = TensorFiles([tmp_path / "1"])
    files.read("a")
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("needs /proc")
    assert str(tmp_path) not in maps.read_text()
    assert not [
        link for link in Path("/proc/self/fd").iterdir() if link.is_symlink() and str(tmp_path) in str(link.readlink())
    ]


def test_weights_are_read_in_the_parameters_dtype_and_every_parameter_has_a_reader() -> None:
    model = on_meta(lambda: nn.Linear(3, 3).to(torch.bfloat16))
    values = torch.randn(3, 3)
    weights = Weights(model, {"weight": lambda: values, "bias": lambda: values[0].clone()})
    assert torch.equal(weights.read("weight"), values.to(torch.bfloat16))
    assert weights.sizes == {"weight": 18, "bias": 6} and weights.shapes["bias"] == (3,)
    with pytest.raises(RuntimeError, match="bias"):
        Weights(model, {"weight": lambda: values})


# ---------------------------------------------------------------------------------------------------------------- fresh


def draw(module: nn.Module) -> None:
    """Touches the parameters one after the other, as an initialisation does."""
    assert isinstance(module, nn.Linear)
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)


def test_a_fresh_value_is_a_function_of_seed_and_key_alone() -> None:
    module = on_meta(lambda: nn.Linear(64, 64))

    def value(parameter: str = "weight", key: str = "x.weight", seed: int = 0, of: nn.Module = module) -> Tensor:
        return fresh_reader(of, parameter, key, seed, draw)()

    expected = value()
    torch.rand(5)
    value("bias", "x.bias")
    assert torch.equal(value(), expected)
    assert torch.equal(value(of=on_meta(lambda: nn.Linear(64, 64).to(torch.bfloat16))), expected)
    assert expected.dtype == torch.float32 and expected.device.type == "cpu"
    assert not torch.equal(value(seed=1), expected) and not torch.equal(value(key="y.weight"), expected)
    assert value("bias", "x.bias").std() > 0.5 and expected.std() == pytest.approx(1, abs=0.05)


def test_a_fresh_value_does_not_depend_on_the_number_of_threads() -> None:
    module = on_meta(lambda: nn.Linear(1024, 1024))
    reader = fresh_reader(module, "weight", "x.weight", 0, draw)
    one, threads = reader(), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(reader(), one)
    finally:
        torch.set_num_threads(threads)


def test_drawing_leaves_the_generator_and_the_module_as_they_were() -> None:
    module = on_meta(lambda: nn.Linear(8, 8))
    state = torch.get_rng_state()
    reader = fresh_reader(module, "weight", "x.weight", 0, draw)
    first = reader()
    assert torch.equal(torch.get_rng_state(), state) and all(p.is_meta for p in module.parameters())
    module.weight = nn.Parameter(torch.zeros(2, 2))  # as engines do
    assert torch.equal(reader(), first)


def test_a_module_that_does_not_say_how_it_starts_is_noticed() -> None:
    module = on_meta(lambda: nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="x.bias: Linear does not say how it starts"):
        fresh_reader(module, "bias", "x.bias", 0, lambda linear: nn.init.ones_(linear.weight))()  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------------- into a model


def test_materialising_reads_each_parameter_once_and_keeps_what_is_shared_or_frozen() -> None:
    model, read = on_meta(Toy), []

    def reader(name: str) -> Tensor:
        read.append(name)
        return counted(name)

    leaves: list[nn.Module] = []

    def on_leaf(module: nn.Module) -> None:
        assert not any(parameter.is_meta for parameter in module.parameters(recurse=False))
        leaves.append(module)

    materialise(model, reader, on_leaf)
    assert sorted(read) == ["first.bias", "first.weight", "frozen", "second.bias"]
    assert leaves == [model, model.first, model.second] and model.second.weight is model.first.weight
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["frozen"]
    assert all(torch.equal(parameter, counted(name)) for name, parameter in model.named_parameters())


def test_a_module_may_be_cut_up_as_soon_as_it_is_real() -> None:
    """As ZeRO-3 does: what has been filled is not looked at again."""
    model = on_meta(Toy)

    def shrink(module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0)

    materialise(model, counted, shrink)
    assert all(p.numel() == 0 and not p.is_meta for p in model.parameters())
    materialise(model, counted)
    assert all(p.numel() == 0 for p in model.parameters())


# ----------------------------------------------------------------------------------------------------------- into files


def test_shares_are_balanced_whole_and_the_same_in_any_order() -> None:
    sizes = {f"block.{i}.{name}": size for i in range(7) for name, size in (("a", 100), ("b", 300), ("norm", 1))}
    sizes |= {"embedding": 900}
    shares = share_of(sizes, 4)
    assert list(shares) == list(sizes)
    assert shares == share_of(dict(reversed(sizes.items())), 4)
    loads = [sum(size for name, size in sizes.items() if shares[name] == rank) for rank in range(4)]
    assert sum(loads) == sum(sizes.values()) and max(loads) - min(loads) <= 100
    assert set(share_of({"a": 1, "b": 1}, 4).values()) == {0, 1}
    assert share_of(sizes, 1) == dict.fromkeys(sizes, 0)


@pytest.mark.parametrize(("most", "files"), [(10**6, 1), (100, 2), (1, 4)])
def test_weights_are_written_in_shards_that_read_as_one(tmp_path: Path, most: int, files: int) -> None:
    model = on_meta(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    values = {name: torch.randn(parameter.shape) for name, parameter in model.named_parameters()}
    given: dict[str, weakref.ref[Tensor]] = {}

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            assert all(tensor() is None for tensor in given.values()), "more than one tensor in memory"
            assert name not in given
            copy = values[name].clone()
            given[name] = weakref.ref(copy)
            return copy

        return read

    write_weights(tmp_path, Weights(model, {name: reader(name) for name in values}), most)
    paths = weight_files(tmp_path)
    assert [path.name for path in paths] == [shard_name(number + 1, files) for number in range(files)]
    assert given.keys() == values.keys()
    read = TensorFiles(paths)
    assert read.shapes.keys() == values.keys()
    assert all(torch.equal(read.read(name), value) for name, value in values.items())
    if files > 1:
        content = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert content["metadata"]["total_size"] == 4 * sum(value.numel() for value in values.values())
        for name, file in content["weight_map"].items():
            assert name in load_file(tmp_path / file)


def test_an_index_is_the_same_bytes_whatever_the_order() -> None:
    assert index({"b": "2", "a": "1"}, 8) == index({"a": "1", "b": "2"}, 8)
