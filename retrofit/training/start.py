"""The model that training starts from, or goes on with, and how its weights are written.

A new stage takes weights only: step 0, a new optimizer, the parent's digest on record. LoRA factors of the parent are
continued unless `model.merge_first` says to merge them; then the merged base is written into the run, so that the new
adapter has a base to name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.adapters import AdapterSettings
from retrofit.checkpoints.loading import Source
from retrofit.checkpoints.weights import (
    INDEX_FILE,
    Files,
    Readers,
    Weights,
    fresh_reader,
    index,
    shard_name,
    share_of,
    write_files,
    write_weights,
)
from retrofit.data.store import TokenStore
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.attention import choose_backend, obstacle
from retrofit.flexmdm.modeling import retrofitted
from retrofit.flexmdm.schedules import schedule_from_dict
from retrofit.sections import FLEXMDM_FIELDS, Recipe, default_of

BASE = "base"
"""Directory in the run of a base that was merged for it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SCHEDULES = ("insertion_schedule", "unmasking_schedule")


@dataclass
class Start:
    """A model ready to be trained, its weights not read yet.

    Attributes:
        model: on the meta device, frozen weights in `dtype`, trainable ones in float32.
        weights: of the model's parameters.
        trainable: names of the parameters that are trained, in the model's order.
        dtype: of frozen weights, and of full weights where they are written.
        adapter: the factors' shape, or None if all weights are trained.
        base: what an adapter names as its base: (path or Hub id, revision).
        merged_base: what `write_merged_base` is still to write to `base`.
        tokenizer_files: name -> bytes. Held in memory: where they came from may be a checkpoint that is rotated away.
        source: what the weights are read from.
        parent: name, kind and digest of what the run started from (see `name_parent`).
        base_digest: of the frozen weights under an adapter (see `digest_base`).
        attention: the back-end (see `choose_attention`).
    """

    model: Any
    weights: Weights
    dtype: torch.dtype
    adapter: AdapterSettings | None
    base: tuple[str, str | None]
    tokenizer_files: dict[str, bytes]
    source: Source
    parent: dict[str, str] = field(default_factory=dict)
    base_digest: str | None = None
    merged_base: Weights | None = None
    attention: str = "auto"
    trainable: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def read(self, name: str) -> Tensor:
        """The values that the model's parameter starts with (see `Weights.read`)."""
        return self.weights.read(name)

    def digest_base(self) -> None:
        """Takes the digest of the frozen weights under an adapter, which a resumed run must find again."""
        if self.adapter is not None:
            self.base_digest = loading.resolve(*self.base).digest()

    def name_parent(self) -> dict[str, str]:
        """What a new run records of its parent. Hashes the weights where nothing else stands for them."""
        return {"name": self.source.name, "kind": self.source.kind, "digest": self.source.digest()}

    def shares(self, world_size: int) -> dict[str, int]:
        """Trainable parameter's name -> the rank that writes it, weights and training state alike."""
        return share_of({name: self.weights.shapes[name].numel() for name in self.trainable}, world_size)

    def files(self, values: Mapping[str, Tensor], rank: int = 0, world_size: int = 1) -> Files:
        """The files by which a checkpoint loads by itself, as far as this rank writes them.

        Full weights are one file or, from several ranks, one shard a rank with an index. An adapter is one file, which
        rank 0 writes. config.json, the tokenizer and the index are rank 0's.

        Args:
            values: trainable parameter's name -> its whole tensor: for full weights those that are this rank's by
                `shares`; for an adapter all of them, on rank 0.
        """
        files: Files = self._small_files() if rank == 0 else {}
        if self.adapter is not None:
            if rank == 0:
                base_model, base_revision = self.base
                written = adapters.adapter_files(
                    values, self.adapter, base_model=base_model, base_revision=base_revision
                )
                files |= {f"adapter/{name}": content for name, content in written.items()}
                files["adapter/config.json"] = files["config.json"]
            return files
        shares = self.shares(world_size)
        if values.keys() != {name for name, owner in shares.items() if owner == rank}:
            raise RuntimeError(f"rank {rank} was given other tensors than its share")
        if values:
            files[shard_name(rank + 1, world_size)] = {name: tensor.to(self.dtype) for name, tensor in values.items()}
        if rank == 0 and world_size > 1:
            total = sum(self.weights.shapes[name].numel() for name in shares) * self.dtype.itemsize
            files[INDEX_FILE] = index(
                {name: shard_name(owner + 1, world_size) for name, owner in shares.items()}, total
            )
        return files

    def _small_files(self) -> Files:
        config = self.model.config
        config.architectures = [type(self.model).__name__]
        config.dtype = self.dtype
        return {"config.json": config.to_json_string(use_diff=True).encode(), **self.tokenizer_files}

    def write_merged_base(self) -> None:
        """Writes the base that was merged for this run, a shard at a time, and lets go of it."""
        if self.merged_base is not None:
            merged = self.merged_base

            def write(directory: Path) -> None:
                write_files(directory, self._small_files())
                write_weights(directory, merged)

            checkpoint.write_directory(Path(self.base[0]), write)
            self.merged_base = None

    def choose_attention(self, recipe: Recipe, device: torch.device) -> None:
        """Settles which back-end `training.attention` stands for on a device.

        Raises:
            ValueError: the one that was asked for cannot compute there.
        """
        asked = recipe.training.attention
        try:
            self.attention = choose_backend(asked, device, _dtype(recipe), self.model.config.head_size)
        except ValueError as error:
            raise ValueError(f"training.{error}") from None

    def describe(self) -> str:
        """One line: class, trainable and total parameters."""
        # Not counted on the model: an engine may have cut its parameters up.
        counts = {name: shape.numel() for name, shape in self.weights.shapes.items()}
        trainable, total = sum(counts[name] for name in self.trainable), sum(counts.values())
        share = f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.1%})"
        return f"{type(self.model).__name__} from {self.source.name}: {share}"


# ------------------------------------------------------------------------------------------------------------ new stage


def from_recipe(recipe: Recipe, store: TokenStore | None, *, verify: bool = True, shapes_only: bool = False) -> Start:
    """Builds the model of step 0 on the meta device.

    What no file holds (factors, and the new modules of what was a plain LLaDA) is fresh: a function of the recipe's
    seed and the parameter's name.

    Args:
        store: the data; None will do for shapes.
        verify: False where the files are compared with their manifests elsewhere.
        shapes_only: config.json will do, and no weights can be read.

    Raises:
        ValueError: init_from cannot be loaded or contradicts the recipe or the data (which field, and how to mend it).
    """
    source = loading.resolve(recipe.model.init_from, recipe.model.revision)
    config = loading.model_config(source)
    for check in checks(recipe, store, source, config).values():
        check()
    dtype = _DTYPES[recipe.model.dtype]
    if recipe.objective.name == "flexmdm" and not isinstance(config, FlexMDMConfig):
        config = _retrofitted(recipe, store, source, config)
    else:
        _check_agreement(recipe, config)
    loaded = dtype if recipe.lora is not None else torch.float32
    model, readers = loading.build(source, config, dtype=loaded, verify=verify, shapes_only=shapes_only)
    adapter, base, merged_base = None, (source.name, source.revision), None
    if source.adapter is not None and recipe.model.merge_first:
        readers = adapters.merged_readers(model, readers)
        adapters.merge_into_base(model)
        if recipe.lora is not None:
            base = (str((Path(recipe.training.output_dir) / BASE).resolve()), None)
            merged_base = Weights(model, readers)
    elif source.adapter is not None:
        full = loading.base_of(source)
        adapter, base = _settings(recipe), (full.name, full.revision)
        for _, layer in adapters.lora_layers(model):
            adapters.set_dropout(layer, adapter.lora_dropout)
    if recipe.lora is not None and adapter is None:
        adapter = _settings(recipe)
        adapters.inject(model, adapter)
    _finish(model, recipe)
    weights = Weights(model, _by_name(model, readers, recipe.training.seed))
    return Start(model, weights, dtype, adapter, base, loading.tokenizer_files(source), source, merged_base=merged_base)


def checks(
    recipe: Recipe, store: TokenStore | None, source: Source, config: LLaDAConfig
) -> dict[str, Callable[[], None]]:
    """What a start is checked for before its model is built, each raising a ValueError of its own."""
    of_model = {
        "objective": lambda: _check_objective(recipe, config),
        "window": lambda: _check_window(recipe, config),
        "attention": lambda: _check_attention(recipe, config),
        "adapter": lambda: _check_adapter(recipe, source),
    }
    if store is None:
        return of_model
    return of_model | {
        "data and model": lambda: store.check_fits(config, window=recipe.objective.window),
        "token budget": lambda: _check_budget(recipe, store),
        "tokenizer": lambda: _check_tokenizer(store, source),
    }


def _retrofitted(recipe: Recipe, store: TokenStore | None, source: Source, config: LLaDAConfig) -> FlexMDMConfig:
    """The configuration of a FlexMDM made of a plain LLaDA; it starts at the data's best function of t."""
    if source.kind == "adapter":
        raise ValueError(
            f"model.init_from: {source.directory} is an adapter of a plain LLaDA; merge it before it becomes a FlexMDM"
        )
    fields = {name: getattr(recipe.model, name) for name in FLEXMDM_FIELDS if getattr(recipe.model, name) is not None}
    if store is not None:
        fields["mean_deletable_tokens"] = store.manifest.mean_deletable_tokens
    # A local path means nothing to whoever gets the checkpoint: only its last part is recorded.
    fields["base_model"] = source.name if source.revision else Path(source.name).name
    fields["base_revision"] = source.revision
    if loading.tokenizer_directory(source) is not None:
        tokenizer = loading.load_tokenizer(source)
        fields["banned_token_ids"] = loading.unwritable_token_ids(tokenizer, config.vocab_size)
    return retrofitted(config, **fields)


def _finish(model: Any, recipe: Recipe) -> None:
    model.eval()  # until the loop says otherwise: dropout draws nothing before the first step
    adapters.select_trainable(model)
    section = recipe.training
    model.model.attention = section.attention
    if (how := section.gradient_checkpointing) is not False:
        selective = how == "selective"
        model.gradient_checkpointing_enable(every_n_layers=1 if selective else int(how), selective=selective)
    if section.compile:
        model.compile_blocks()


def _by_name(model: Any, readers: Readers, seed: int) -> Readers:
    """A reader for each of the model's parameters; those that no file holds are drawn."""
    layers = dict(adapters.lora_layers(model))
    named: Readers = {}
    for name, _ in model.named_parameters():
        plain = adapters.plain_name(name)
        if plain in readers:
            named[name] = readers[plain]
        elif adapters.is_factor(name):
            path = name.partition(".lora_")[0]
            named[name] = fresh_reader(layers[path], name.removeprefix(f"{path}."), name, seed, adapters.draw_factors)
        else:
            path, _, last = name.rpartition(".")
            named[name] = fresh_reader(model.get_submodule(path), last, name, seed, model._init_weights)
    return named


def _settings(recipe: Recipe) -> AdapterSettings:
    assert recipe.lora is not None
    lora = recipe.lora
    return AdapterSettings(lora.r, lora.lora_alpha, lora.lora_dropout, tuple(lora.target_modules))


def _check_objective(recipe: Recipe, config: LLaDAConfig) -> None:
    if recipe.objective.name == "mdm" and isinstance(config, FlexMDMConfig):
        raise ValueError(
            f"objective.name: mdm cannot train {recipe.model.init_from}, which is a FlexMDM; "
            "use flexmdm, or start from a plain LLaDA"
        )
    if recipe.model.dtype == "bfloat16" and recipe.lora is not None and not recipe.training.bf16:
        raise ValueError("model.dtype: bfloat16 weights need training.bf16: true (the factors beside them are float32)")


def _check_tokenizer(store: TokenStore, source: Source) -> None:
    if loading.tokenizer_directory(source) is not None:
        loading.load_tokenizer(source)  # refuses ids beyond the embedding
        store.check_tokenizer(loading.tokenizer_files(source).get("tokenizer.json"))


def _check_window(recipe: Recipe, config: LLaDAConfig) -> None:
    slot = 1 if recipe.objective.name == "flexmdm" else 0
    most = config.max_sequence_length - slot
    if recipe.objective.window > most:
        raise ValueError(
            f"objective.window: {recipe.objective.window} tokens{' and the end slot' if slot else ''} exceed the "
            f"{config.max_sequence_length} rows of {recipe.model.init_from} (max_sequence_length); at most {most}"
        )


def _check_attention(recipe: Recipe, config: LLaDAConfig) -> None:
    """As far as it can be known without the device that will train."""
    asked = recipe.training.attention
    problem = None if asked == "auto" else obstacle(asked, None, _dtype(recipe), config.head_size)
    if problem is not None:
        raise ValueError(f"training.attention: {asked} {problem}; mend that, or choose auto")


def _dtype(recipe: Recipe) -> torch.dtype:
    """What the blocks compute in."""
    return torch.bfloat16 if recipe.training.bf16 else torch.float32


def _check_budget(recipe: Recipe, store: TokenStore) -> None:
    """Refuses a document that no micro-batch can hold: one of which no token happens to be deleted, and its slot."""
    budget, longest = recipe.training.max_tokens_per_device, store.longest
    if recipe.objective.name == "flexmdm" and budget != "auto" and longest + 1 > budget:
        raise ValueError(
            f"training.max_tokens_per_device: {budget} rows cannot hold the longest document of {store.path}, "
            f"{longest} tokens and its end slot; make it at least {longest + 1}, "
            f"or prepare the data with --max-length {budget - 1}"
        )


def _check_adapter(recipe: Recipe, source: Source) -> None:
    if source.adapter is None:
        if recipe.model.merge_first:
            raise ValueError(f"model.merge_first: {recipe.model.init_from} is no adapter; remove the field")
        return
    if recipe.model.merge_first:
        return
    if recipe.lora is None:
        raise ValueError(
            f"model.init_from: {recipe.model.init_from} is an adapter and the recipe has no section lora; "
            "set model.merge_first: true to train all weights, or give the adapter's section lora"
        )
    parents, _, _ = adapters.read_adapter_config(source.adapter)
    difference = _settings(recipe).difference(parents)
    if difference:
        raise ValueError(
            f"lora: {difference} in the recipe and in {recipe.model.init_from}; make them equal to continue the same "
            "factors, or set model.merge_first: true to start new ones"
        )


def _check_agreement(recipe: Recipe, config: LLaDAConfig) -> None:
    """The recipe may repeat what a FlexMDM was trained with, not contradict it."""
    for name in FLEXMDM_FIELDS:
        asked = getattr(recipe.model, name)
        trained = getattr(config, name, None)
        if asked is None or not isinstance(config, FlexMDMConfig):
            continue
        same = schedule_from_dict(asked) == schedule_from_dict(trained) if name in _SCHEDULES else asked == trained  # type: ignore[arg-type]
        if not same:
            raise ValueError(
                f"model.{name}: {asked} in the recipe, but {recipe.model.init_from} was trained with {trained}; "
                "leave it out to inherit, or start from the plain LLaDA"
            )


# --------------------------------------------------------------------------------------------------------------- resume


def from_checkpoint(
    recipe: Recipe, directory: Path, record: Mapping[str, Any], store: TokenStore, *, verify: bool = True
) -> Start:
    """Builds the model of a checkpoint of this run on the meta device.

    Frozen weights are read from the base. Trainable ones are what the checkpoint loads by itself with, rounded or
    averaged as the case may be; their masters come from the training state afterwards.

    Args:
        verify: False where the files are compared with their manifests elsewhere.

    Raises:
        ValueError: the checkpoint or its base cannot be loaded, or does not fit the data.
    """
    source = loading.resolve(directory)
    config = loading.model_config(source)
    store.check_fits(config, window=recipe.objective.window)
    _check_budget(recipe, store)
    _check_tokenizer(store, source)
    dtype = _DTYPES[recipe.model.dtype]
    loaded = dtype if recipe.lora is not None else torch.float32
    model, readers = loading.build(source, config, dtype=loaded, verify=verify)
    adapter, base = None, (source.name, source.revision)
    if source.kind == "adapter":
        adapter = _settings(recipe)
        full = loading.base_of(source)
        base = (full.name, full.revision)
    _finish(model, recipe)
    named = {name: readers[adapters.plain_name(name)] for name, _ in model.named_parameters()}
    files = loading.tokenizer_files(source)
    return Start(model, Weights(model, named), dtype, adapter, base, files, source, dict(record["parent"]))


FREE_FIELDS = frozenset(
    {
        "data.path",  # the data's digest is compared instead
        "data.num_workers",
        "training.output_dir",
        "training.max_tokens_per_device",
        "training.per_device_train_batch_size",
        "training.gradient_accumulation_steps",
        "training.attention",
        "training.gradient_checkpointing",
        "training.compile",
        "training.save_steps",
        "training.save_total_limit",
        "training.save_every_keep",
        "training.skip_steps",
        "training.stop_after_minutes",
        "training.step_timeout_minutes",
        "training.start_timeout_minutes",
        "training.eval_steps",
        "training.eval_documents",
        "training.logging_steps",
        "training.sample_steps",
        "training.report_to",
        "sampling.prompts",
        "sampling.chat",
        "sampling.steps",
        "sampling.order",
        "sampling.temperature",
    }
)
"""Recipe fields that a resumed run may change: none of them changes what is computed, beyond rounding."""

BEFORE_THE_FIELD = {"objective.time_sampling": "uniform"}
"""Fields whose default differs from what runs did when there was no such field."""

FIXED_FIELDS = ("model.", "lora.", "objective.name")
"""Beginnings of the names of fields that no override can change."""

DATA_PATH = "data.path"


def check_same_run(
    recipe: Mapping[str, Any], recorded: Mapping[str, Any], directory: Path, overrides: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Refuses to go on with another recipe than the run's, in fields that change the mathematics.

    Args:
        recipe, recorded: both as `dataclasses.asdict` gives them.
        overrides: fields that may differ all the same.

    Returns:
        field -> [was, is] of those overridden.

    Raises:
        ValueError: names every differing field with both values, or an override that cannot be had.
    """
    ours, theirs = _flatten(recipe), _flatten(recorded)
    names = sorted((ours.keys() | theirs.keys()) - FREE_FIELDS)
    fixed = sorted(name for name in overrides if name.startswith(FIXED_FIELDS))
    if fixed:
        raise ValueError(
            f"--override {fixed[0]}: it decides which tensors there are, or what they mean; start a new stage from the "
            "checkpoint's weights instead (model.init_from)"
        )
    unknown = sorted(set(overrides) - set(names) - {DATA_PATH})
    if unknown:
        raise ValueError(f"--override {unknown[0]}: no field of the recipe, or one that may change without it")
    # A field that is newer than the run: it ran on the default, or on what there was before the field.
    was = {name: theirs.get(name, BEFORE_THE_FIELD.get(name, default_of(name))) for name in names}
    differing = [name for name in names if ours.get(name) != was[name]]
    refused = [name for name in differing if name not in overrides]
    if refused:
        listed = ", ".join(f"{name} is {ours.get(name)} and was {was[name]}" for name in refused)
        raise ValueError(
            f"training.output_dir: {directory} holds a run of another recipe ({listed}); put these fields back to "
            "resume it, allow a change with --override FIELD, or choose another directory"
        )
    return {name: [was[name], ours.get(name)] for name in differing}


def _flatten(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"{section}.{name}": value
        for section, fields in recipe.items()
        if fields is not None
        for name, value in fields.items()
    }


def check_same_data(
    store: TokenStore, record: Mapping[str, Any], directory: Path, overrides: Collection[str] = ()
) -> dict[str, list[Any]]:
    """Refuses data other than those the run was trained on so far (ValueError), unless `data.path` is overridden."""
    ours, theirs = store.manifest.digest, record["data_digest"]
    if ours == theirs:
        return {}
    if DATA_PATH in overrides:
        return {DATA_PATH: [f"data of digest {theirs[:12]}", f"data of digest {ours[:12]}"]}
    raise ValueError(
        f"data.path: {store.path} has digest {ours[:12]}, but {directory} was trained on data of digest "
        f"{theirs[:12]}; restore those data to resume, allow it with --override data.path, or choose another "
        "training.output_dir"
    )
