"""What a run starts with, by name: read from the files that hold it, fresh where none does, and written by ranks."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.loading import load_model
from retrofit.checkpoints.weights import materialise, write_files
from retrofit.data.store import TokenStore
from retrofit.flexmdm import FlexMDMForMaskedDiffusion, LLaDAConfig
from retrofit.recipe import Recipe
from retrofit.training import start

MakeRecipe = Callable[..., Recipe]

LORA = ("--lora.r=4", "--lora.lora_alpha=8", "--lora.target_modules=[q_proj, model.transformer.ff_out]")
BF16 = ("--model.dtype=bfloat16", "--training.bf16=true")
QUICK = ("--training.max_steps=2", "--model.time_hidden_size=null")
FROM_LLADA = ("--training.max_steps=2", "--model.time_hidden_size=32")


def begin(recipe: Recipe) -> start.Start:
    return start.from_recipe(recipe, TokenStore.open(recipe.data.path, "train"))


def resume(recipe: Recipe) -> start.Start:
    newest, _ = checkpoint.latest(Path(recipe.training.output_dir) / "checkpoints")
    assert newest is not None
    record = checkpoint.read_record(newest)
    return start.from_checkpoint(recipe, newest, record, TokenStore.open(recipe.data.path, "train"))


def all_values(begin: start.Start) -> dict[str, torch.Tensor]:
    return {name: begin.read(name) for name in begin.weights.shapes}


def shard(model: Path, directory: Path) -> Path:
    """A copy of a model directory with its weights in two shards."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in sorted(set(names.values())):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, directory / file, {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return directory


# ------------------------------------------------------------------------------------------------------- fresh weights


def test_fresh_weights_depend_on_the_seed_alone(make_recipe: MakeRecipe, toy: Path, tmp_path: Path) -> None:
    """Not on what was drawn before, the other options, the order of reading, the dtype or the base's files."""

    def fresh(*options: str, backwards: bool = False) -> dict[str, torch.Tensor]:
        torch.rand(3)
        started = begin(make_recipe(tmp_path / "run", *FROM_LLADA, *options))
        names = [name for name in started.trainable if not name.startswith("model.") or adapters.is_factor(name)]
        return {name: started.read(name) for name in (reversed(names) if backwards else names)}

    def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())

    full, lora = fresh(), fresh(*LORA)
    assert len(lora) == len(full) + 2 * 3
    sharded = shard(toy / "model", tmp_path / "sharded")
    same = [
        fresh(backwards=True), fresh(*LORA, backwards=True), fresh(*LORA, *BF16),
        fresh(*LORA, "--training.gradient_checkpointing=true"), fresh(*LORA, f"--model.init_from={sharded}"),
        fresh("--lora.r=4", "--lora.lora_alpha=1", "--lora.target_modules=[v_proj, q_proj]"),
    ]  # fmt: skip
    assert all(equal(full, other) and equal(lora, other) for other in [lora, *same])
    other_seed = fresh(*LORA, "--training.seed=1")
    drawn = [name for name, tensor in lora.items() if tensor.unique().numel() > 1]
    assert sum("lora_A" in name for name in drawn) == 3 and "insertion_head.hidden.weight" in drawn
    assert not any(torch.equal(lora[name], other_seed[name]) for name in drawn)
    assert len({lora[name].flatten()[0].item() for name in drawn}) == len(drawn)  # each its own


def test_fresh_weights_are_spread_as_the_model_and_peft_mean_them(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    started = begin(make_recipe(tmp_path / "run", *FROM_LLADA, *LORA))
    head = "model.transformer.ff_out"
    assert started.read("insertion_head.hidden.weight").std() == pytest.approx(started.model.config.init_std, rel=0.1)
    assert started.read("insertion_head.norm.weight").unique().tolist() == [1]
    for name in ("insertion_head.hidden.bias", "insertion_head.output.weight", f"{head}.lora_B.default.weight"):
        assert not started.read(name).any()
    a = started.read(f"{head}.lora_A.default.weight")
    bound = 32**-0.5  # Kaiming's with a = sqrt(5): uniform within 1 / sqrt(columns)
    assert a.shape == (4, 32) and 0.9 * bound < a.abs().max() <= bound


def test_building_and_reading_draw_nothing_from_the_generator_of_others(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    state = torch.get_rng_state()
    all_values(begin(make_recipe(tmp_path / "run", *FROM_LLADA, *LORA, "--lora.lora_dropout=0.1")))
    assert torch.equal(torch.get_rng_state(), state)


# ---------------------------------------------------------------------------------------------------- weights by name


@pytest.mark.parametrize("options", [(), LORA, (*LORA, *BF16)])
def test_a_start_is_on_meta_and_reads_what_the_base_holds(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    base = load_file(toy / "model" / "model.safetensors")
    started = begin(make_recipe(tmp_path / "run", *FROM_LLADA, *options))
    assert all(parameter.is_meta for parameter in started.model.parameters())
    assert not any(module.training for module in started.model.modules())
    frozen = torch.bfloat16 if options[-1:] == BF16[-1:] else torch.float32
    for name, parameter in started.model.named_parameters():
        tensor = started.read(name)
        assert (tensor.shape, tensor.dtype) == (parameter.shape, parameter.dtype)
        assert tensor.dtype == (torch.float32 if parameter.requires_grad else frozen)
        assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
        plain = adapters.plain_name(name)
        assert plain not in base or torch.equal(tensor, base[plain].to(tensor.dtype))
        assert tensor.data_ptr() != started.read(name).data_ptr()
    assert base.keys() <= {adapters.plain_name(name) for name in started.weights.shapes}
    trains = {name: parameter.requires_grad for name, parameter in started.model.named_parameters()}
    materialise(started.model, started.read)
    assert trains == {name: parameter.requires_grad for name, parameter in started.model.named_parameters()}
    assert all(torch.equal(p, started.read(name)) for name, p in started.model.named_parameters())


def test_a_resumed_adapter_reads_its_frozen_weights_from_the_base_and_the_rest_from_the_checkpoint(
    make_recipe: MakeRecipe, toy: Path, runs: Path, tmp_path: Path
) -> None:
    shutil.copytree(runs / "lora", tmp_path / "lora")
    started = resume(make_recipe(tmp_path / "lora", *FROM_LLADA, *LORA))
    assert all(parameter.is_meta for parameter in started.model.parameters())
    base = load_file(toy / "model" / "model.safetensors")
    trained = load_file(runs / "lora" / "final" / "adapter" / adapters.WEIGHTS_FILE)
    for name in started.weights.shapes:
        key = "base_model.model." + name.replace(".default.", ".")
        expected = trained[key] if name in started.trainable else base[adapters.plain_name(name)]
        assert torch.equal(started.read(name), expected)
    assert len(started.trainable) == len(trained)


def test_a_model_of_eight_billion_parameters_is_built_without_memory(
    make_recipe: MakeRecipe, toy: Path, tmp_path: Path
) -> None:
    """LLaDA-8B's shapes over a file of 16 GB that takes no room on the disk: only its header is written."""
    directory = tmp_path / "model"
    shutil.copytree(toy / "model", directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288}
    config |= {"vocab_size": 126464, "embedding_size": 126464, "dtype": "bfloat16", "max_sequence_length": 4096}
    (directory / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, parameter in loading.on_meta(LLaDAConfig.from_dict(config), torch.bfloat16).named_parameters():
        where = [offset, offset + parameter.nbytes]
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": where}
        offset = where[1]
    assert (len(header), offset) == (291, 2 * 8_015_581_184)
    text = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)

    options = (
        "--training.max_steps=2",
        "--lora.r=128",
        "--lora.lora_alpha=128",
        *BF16,
        f"--model.init_from={directory}",
    )
    targets = "--lora.target_modules=[q_proj, k_proj, v_proj, model.transformer.ff_out]"
    started = begin(make_recipe(tmp_path / "run", *options, targets, "--model.time_hidden_size=16384"))
    assert all(parameter.is_meta for parameter in started.model.parameters())
    assert sum(shape.numel() for shape in started.weights.shapes.values()) > 8_400_000_000
    tensor = started.read("model.transformer.blocks.31.attn_norm.weight")
    assert tensor.shape == (4096,) and not tensor.any()
    assert started.read("model.transformer.ff_out.lora_A.default.weight").shape == (128, 4096)


def damage(directory: Path, how: str) -> None:
    """Spoils a model's or an adapter's weights in one way."""
    (path,) = (
        directory.rglob("*.safetensors") if "shard" not in how else (directory / "model-00002-of-00002.safetensors",)
    )
    if how in ("missing file", "missing shard"):
        path.unlink()
    elif how in ("cut", "cut shard"):
        path.write_bytes(path.read_bytes()[:-9])
    else:
        tensors = load_file(path)
        name = sorted(name for name in tensors if tensors[name].dim() == 2)[0]
        if how != "surplus":
            tensor = tensors.pop(name)
        if how == "misshapen":
            tensors[name] = tensor[:-1].clone()
        if how in ("surplus", "renamed"):
            tensors["x." + name] = torch.zeros(1)
        save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("place", "how", "message"),
    [
        ("model", "missing file", "holds neither model.safetensors nor"),
        ("model", "cut", "model.safetensors: not a readable safetensors file"),
        (
            "model",
            "missing",
            "1 missing tensors for .*: model.transformer.blocks.0.attn_out.weight; the weights do not",
        ),
        ("model", "surplus", "1 surplus tensors for .*: x.model"),
        ("model", "misshapen", r"1 misshapen tensors for .*attn_out.weight \[31, 32\] for \[32, 32\]"),
        ("sharded", "missing shard", "model-00002-of-00002.safetensors is missing, though the index names it"),
        ("sharded", "cut shard", "model-00002-of-00002.safetensors: not a readable safetensors file"),
        ("adapter", "missing file", "adapter_model.safetensors is missing"),
        ("adapter", "cut", "adapter_model.safetensors: not a readable safetensors file"),
        ("adapter", "missing", "does not fit its base: 1 missing keys"),
        ("adapter", "misshapen", "does not fit its base: 1 misshapen keys"),
        ("adapter", "renamed", r"does not fit its base: 1 unmatched keys \(x.base.*1 missing keys"),
    ],
)
def test_weights_that_do_not_fit_are_refused_when_the_start_is_built(
    make_recipe: MakeRecipe, runs: Path, toy: Path, tmp_path: Path, place: str, how: str, message: str
) -> None:
    directory = tmp_path / place
    if place == "adapter":
        shutil.copytree(runs / "lora" / "final" / "adapter", directory)
    elif place == "sharded":
        shard(toy / "model", directory)
    else:
        shutil.copytree(toy / "model", directory)
    damage(directory, how)
    options = (*QUICK, *LORA) if place == "adapter" else FROM_LLADA
    with pytest.raises(ValueError, match=message) as refusal:
        begin(make_recipe(tmp_path / "next", *options, f"--model.init_from={directory}"))
    assert str(directory) in str(refusal.value) and "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match=message):  # inference reads the same way
        load_model(directory)


def test_ranks_that_share_the_verifying_can_leave_it_out_here(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path
) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(runs / "full", parent)
    weights = parent / "final" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    recipe = make_recipe(tmp_path / "next", *QUICK, f"--model.init_from={parent}")
    started = start.from_recipe(recipe, TokenStore.open(recipe.data.path, "train"), verify=False)
    assert loading.directories(started.source) == [parent / "final"]
    with pytest.raises(ValueError, match="model.safetensors differs from its SHA-256"):
        begin(recipe)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_lora", [True, False])
def test_merge_first_reads_what_merging_in_memory_makes(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, dtype: torch.dtype, with_lora: bool
) -> None:
    options = [*QUICK, f"--model.init_from={runs / 'lora'}", "--model.merge_first=true"]
    options += BF16 if dtype == torch.bfloat16 else ()
    options += LORA if with_lora else ()
    started = begin(make_recipe(tmp_path / "next", *options))
    # Without factors all weights are trained: merged, and kept, in float32.
    merged, _ = load_model(runs / "lora", dtype=dtype if with_lora else torch.float32)
    before = {name: parameter.clone() for name, parameter in merged.named_parameters() if "base_layer" in name}
    adapters.merge_into_base(merged)
    expected = dict(merged.named_parameters())
    assert all(not torch.equal(tensor, expected[adapters.plain_name(name)]) for name, tensor in before.items())
    for name in started.weights.shapes:
        if not adapters.is_factor(name):
            assert torch.equal(started.read(name), expected[adapters.plain_name(name)]), name
    factors = {name: started.read(name) for name in started.trainable if adapters.is_factor(name)}
    assert len(factors) == (6 if with_lora else 0) and not any(f.any() for n, f in factors.items() if "lora_B" in n)
    if with_lora:
        started.write_merged_base()
        assert started.merged_base is None
        written, _ = load_model(tmp_path / "next" / "base", dtype=dtype)
        assert all(torch.equal(p.to(dtype), expected[name].to(dtype)) for name, p in written.named_parameters())


# -------------------------------------------------------------------------------------------------- what ranks write


@pytest.mark.parametrize("world_size", [1, 2, 4, 64])
def test_the_files_of_all_ranks_make_one_model(
    make_recipe: MakeRecipe, runs: Path, tmp_path: Path, world_size: int
) -> None:
    """64 ranks are more than there are tensors: those without a share write nothing."""
    started = begin(make_recipe(tmp_path / "next", *QUICK, f"--model.init_from={runs / 'full'}"))
    shares = started.shares(world_size)
    assert list(shares) == started.trainable == list(started.weights.shapes)
    together: dict[str, object] = {}
    for rank in range(world_size):
        values = {name: started.read(name) for name, owner in shares.items() if owner == rank}
        files = started.files(values, rank, world_size)
        assert not files.keys() & together.keys() and (rank == 0 or all(name.startswith("model-") for name in files))
        assert len(files) == bool(values) or rank == 0
        together |= files
        write_files(tmp_path, files)
    assert ("model.safetensors" in together) == (world_size == 1) != ("model.safetensors.index.json" in together)
    loaded = FlexMDMForMaskedDiffusion.from_pretrained(tmp_path)
    assert all(torch.equal(parameter, started.read(name)) for name, parameter in loaded.named_parameters())
    assert (tmp_path / "tokenizer.json").read_bytes() == (runs / "full" / "final" / "tokenizer.json").read_bytes()
    started.model.config.save_pretrained(tmp_path / "plain")
    assert (tmp_path / "plain" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_full_weights_are_written_in_the_recipes_dtype(make_recipe: MakeRecipe, toy: Path, tmp_path: Path) -> None:
    started = begin(make_recipe(tmp_path / "next", *FROM_LLADA, *BF16))
    assert {started.read(name).dtype for name in started.trainable} == {torch.float32}
    for rank in range(2):
        shares = started.shares(2)
        write_files(
            tmp_path,
            started.files({name: started.read(name) for name, owner in shares.items() if owner == rank}, rank, 2),
        )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = [(tmp_path / file).stat().st_size for file in set(index["weight_map"].values())]
    assert 0 < sum(sizes) - index["metadata"]["total_size"] < 8000  # the headers
    assert {p.dtype for p in load_model(tmp_path)[0].parameters()} == {torch.bfloat16}


def test_a_rank_with_tensors_that_are_not_its_share_is_a_mistake_of_ours(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    started = begin(make_recipe(tmp_path / "next", *FROM_LLADA))
    with pytest.raises(RuntimeError, match="rank 1 was given other tensors than its share"):
        started.files(all_values(started), 1, 2)


def test_an_adapter_is_one_file_of_rank_0(make_recipe: MakeRecipe, toy: Path, runs: Path, tmp_path: Path) -> None:
    started = begin(make_recipe(tmp_path / "next", *QUICK, *LORA, f"--model.init_from={runs / 'lora'}"))
    values = {name: started.read(name) for name in started.trainable}
    assert started.files({}, 1, 2) == {}
    files = started.files(values, 0, 2)
    assert {"config.json", "tokenizer.json", "adapter/config.json", "adapter/adapter_config.json"} < files.keys()
    write_files(tmp_path / "written", files)
    ours, theirs = (load_model(place)[0] for place in (tmp_path / "written", runs / "lora"))
    for (name, parameter), (_, other) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(parameter, other), name
