"""From what a user names (run, checkpoint, adapter, merged directory, Hub id) to a model and its tokenizer.

No remote code is run and nothing is unpickled. Loading is strict: a tensor or an adapter key that is missing, surplus
or misshapen is an error, never a warning.
"""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig, LLaDAForMaskedDiffusion
from retrofit.flexmdm.modeling import NEW_MODULES

from . import adapters, checkpoint
from .weights import Readers, TensorFiles, Weights, full_readers, materialise, weight_files

Kind = Literal["full", "adapter"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", adapters.CONFIG_FILE, *TOKENIZER_FILES]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """Where weights lie.

    Attributes:
        kind: "full", or "adapter" where LoRA factors are to be put on a base.
        directory: holds config.json and the tokenizer, and model.safetensors (full) or the adapter.
        adapter: the PEFT directory, for an adapter.
        name: what others can load it by: the Hub id, or the directory's absolute path.
        revision: the commit of a Hub id, else None.
    """

    kind: Kind
    directory: Path
    name: str
    adapter: Path | None = None
    revision: str | None = None

    def digest(self) -> str:
        """Stands for the weights: a checkpoint's own digest, a Hub commit, or SHA-256 over the weight files."""
        if self.revision:
            return f"hub:{self.name}@{self.revision}"
        try:
            return str(checkpoint.read_manifest(self.directory)["digest"])
        except ValueError:
            pass
        folder = self.adapter or self.directory
        hashes = {path.name: checkpoint.sha256(path) for path in sorted(folder.glob("*.safetensors"))}
        return "sha256:" + checkpoint.digest_of(hashes)


def resolve(path: str | Path, revision: str | None = None) -> Source:
    """Finds the weights that `path` names.

    Args:
        path: a run directory (its final/, else its newest checkpoint that verifies), a checkpoint, a bare PEFT adapter
            directory, a directory in the released layout, or a Hub id, which is downloaded (safetensors only).
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: there is nothing of the kind (what was found instead is said).
    """
    directory = Path(path)
    if not directory.exists():
        return _from_hub(str(path), revision)
    if revision:
        raise ValueError(f"{path}: is a local directory, so the revision {revision!r} has no meaning; leave it out")
    if not directory.is_dir():
        raise ValueError(f"{path}: is a file; give the directory that holds config.json")
    if (directory / "checkpoints").is_dir() or (directory / "final").is_dir():
        directory = _newest_of_run(directory)
    return _in_directory(directory, str(directory.resolve()), None)


def _newest_of_run(run: Path) -> Path:
    if (run / "final").is_dir():
        return run / "final"
    newest, passed_over = checkpoint.latest(run / "checkpoints")
    if newest is None:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in passed_over) or "none was written yet"
        raise ValueError(f"{run}: this run has no checkpoint that verifies ({reasons})")
    return newest


def _in_directory(directory: Path, name: str, revision: str | None) -> Source:
    if (directory / "adapter" / adapters.CONFIG_FILE).is_file():
        return Source("adapter", directory, name, directory / "adapter", revision)
    if (directory / adapters.CONFIG_FILE).is_file():
        return Source("adapter", directory, name, directory, revision)
    if (directory / "config.json").is_file():
        return Source("full", directory, name, None, revision)
    raise ValueError(
        f"{directory}: is neither a run, a checkpoint, an adapter nor a model directory "
        f"(no config.json, no {adapters.CONFIG_FILE})"
    )


def is_hub_id(name: str) -> bool:
    """Whether the name has the form of one."""
    return _HUB_ID.fullmatch(name) is not None


def _from_hub(name: str, revision: str | None) -> Source:
    if not is_hub_id(name):
        raise ValueError(f"{name}: no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name}: no such directory here, and not to be had from the Hub ({reason})") from error
    return _in_directory(directory, name, directory.name)  # the snapshot's folder is named by its commit


# -------------------------------------------------------------------------------------------------------------- loading


def load_model(
    path: str | Path, *, revision: str | None = None, dtype: torch.dtype | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer. See `resolve` for what `path` may be.

    An adapter's factors stay apart from their base. Where a directory has a manifest, the files that were read are
    verified against it, the base's too.

    Args:
        dtype: of the weights; None keeps the files' own. Factors and new modules of an adapter are float32 always.

    Raises:
        ValueError: nothing loadable there, or the files do not fit together.
    """
    source = resolve(path, revision)
    return load_source(source, dtype=dtype), load_tokenizer(source)


def load_source(source: Source, *, dtype: torch.dtype | None = None) -> Any:
    """The model of a resolved source, an adapter's factors injected and loaded. Verified as `load_model` says."""
    with ExitStack() as stack:
        for directory in directories(source):
            stack.enter_context(checkpoint.reading(directory))
        model, readers = build(source, model_config(source), dtype=dtype)
        named = {name: readers[adapters.plain_name(name)] for name, _ in model.named_parameters()}
        materialise(model, Weights(model, named).read)
    return model


def build(
    source: Source,
    config: LLaDAConfig,
    *,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    shapes_only: bool = False,
) -> tuple[Any, Readers]:
    """The model of a source on the meta device, and where its weights are to be had.

    An adapter's factors are injected. Names, shapes and manifests are checked here, so that reading finds no surprise.

    Args:
        config: the source's own, or a FlexMDM's for a plain LLaDA: then its new modules get no readers.
        dtype: of the weights; None keeps the files' own. Factors and new modules of an adapter are float32 always.
        verify: False where somebody else verifies the files of `directories`.
        shapes_only: the files of the weights may be absent, and the readers raise.

    Returns:
        the model in evaluation mode, and readers by plain names, of the factors by theirs (see
        `adapters.plain_name`).

    Raises:
        ValueError: the files are missing, not readable, damaged, or do not fit together.
    """
    full = source if source.adapter is None else base_of(source)
    files = TensorFiles([] if shapes_only else weight_files(full.directory))
    theirs = model_config(full)
    if isinstance(theirs, FlexMDMConfig) and not isinstance(config, FlexMDMConfig):
        raise ValueError(f"{full.directory}: is a FlexMDM, and {source.directory} says that its base is a plain LLaDA")
    becomes_flexmdm = isinstance(config, FlexMDMConfig) and not isinstance(theirs, FlexMDMConfig)
    model = on_meta(config, dtype or config.dtype or next(iter(files.dtypes.values()), None) or torch.float32)
    fresh = NEW_MODULES if becomes_flexmdm else ()
    readers = {} if shapes_only else full_readers(model, full.directory, files, fresh)
    if source.adapter is not None:
        settings, _, _ = adapters.read_adapter_config(source.adapter)
        adapters.inject(model, settings)
        adapters.select_trainable(model)
        readers |= {} if shapes_only else adapters.adapter_readers(model, source.adapter)
    if shapes_only:
        return model.eval(), {adapters.plain_name(name): _not_read for name, _ in model.named_parameters()}
    if verify:  # last, since names and shapes say more of what is wrong
        for directory in directories(source):
            verify_files(directory)
    return model.eval(), readers  # an injected layer's dropout is in training mode


def _not_read() -> Tensor:
    raise RuntimeError("the model was built for its shapes: its weights cannot be read")


def on_meta(config: LLaDAConfig, dtype: torch.dtype) -> Any:
    """A model of the class that its configuration is of, whose weights have no memory."""
    model_class = FlexMDMForMaskedDiffusion if isinstance(config, FlexMDMConfig) else LLaDAForMaskedDiffusion
    with torch.device("meta"):
        return model_class(config).to(dtype)


def directories(source: Source) -> list[Path]:
    """The directories whose files make up the model, an adapter's base first."""
    return [source.directory] if source.adapter is None else [base_of(source).directory, source.directory]


def verify_files(directory: Path) -> None:
    """Refuses files that differ from the directory's manifest, if it has one (ValueError)."""
    if (directory / checkpoint.MANIFEST).is_file():
        refuse_damage(directory, checkpoint.find_problem(directory, only=is_loaded))


def is_loaded(name: str) -> bool:
    """Whether a checkpoint's file has to do with what it loads as, rather than with training on."""
    return "training_state" not in name


def refuse_damage(directory: Path, problem: str | None) -> None:
    """Refuses a directory that has a problem (ValueError)."""
    if problem is not None:
        raise ValueError(f"{directory}: damaged or changed since it was written: {problem}")


def base_of(source: Source) -> Source:
    """The full weights under an adapter.

    Raises:
        ValueError: the adapter names no base, or the base is not there.
    """
    assert source.adapter is not None
    _, name, revision = adapters.read_adapter_config(source.adapter)
    file = source.adapter / adapters.CONFIG_FILE
    if not name:
        raise ValueError(f"{file}: names no base model (base_model_name_or_path)")
    try:
        base = resolve(name, revision)
    except ValueError as error:
        raise ValueError(f"{file}: no base model: {error}; set base_model_name_or_path to where it is now") from error
    if base.kind != "full":
        raise ValueError(f"{file}: the base model {name} is an adapter itself; merge it first")
    return base


def model_config(source: Source) -> LLaDAConfig:
    """The configuration of a source, of the class that its model_type says.

    A bare adapter without config.json has its base's.

    Raises:
        ValueError: config.json is absent, broken, or of another model type.
    """
    path = next(
        (folder / "config.json" for folder in (source.directory, source.adapter) if folder and _has_config(folder)),
        None,
    )
    if path is None:
        if source.adapter is None:
            raise ValueError(f"{source.directory}: config.json is missing")
        config = model_config(base_of(source))
        settings_file = json.loads((source.adapter / adapters.CONFIG_FILE).read_text(encoding="utf-8"))
        if settings_file.get("modules_to_save") and not isinstance(config, FlexMDMConfig):
            raise ValueError(f"{source.adapter}: config.json is missing, and with it the schedules; copy it there")
        return config
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        model_type = values.get("model_type")
        values.pop("auto_map", None)  # of an exported folder: what is saved after training on has no code beside it
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a model configuration ({error})") from error
    classes: dict[Any, type[LLaDAConfig]] = {"llada": LLaDAConfig, "flexmdm": FlexMDMConfig}
    if not isinstance(model_type, str) or model_type not in classes:
        raise ValueError(f"{path}: model_type is {model_type!r}; only llada and flexmdm are supported")
    try:
        return classes[model_type].from_dict(values)
    except ValueError:
        raise
    except Exception as error:  # transformers' checks of the fields that every model has raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path}: a field that is no value of its kind ({reason})") from error


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def tokenizer_directory(source: Source) -> Path | None:
    """The directory that has the source's tokenizer (its own, or its base's), or None."""
    if (source.directory / "tokenizer.json").is_file() or (source.directory / "tokenizer_config.json").is_file():
        return source.directory
    return tokenizer_directory(base_of(source)) if source.adapter is not None else None


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """Name and content of the files of a source's tokenizer; empty where there is none."""
    directory = tokenizer_directory(source)
    if directory is None:
        return {}
    return {name: (directory / name).read_bytes() for name in TOKENIZER_FILES if (directory / name).is_file()}


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a source. Raises ValueError where there is none."""
    directory = tokenizer_directory(source)
    if directory is None:
        raise ValueError(f"{source.directory}: holds no tokenizer (tokenizer.json); copy the base model's files there")
    # Without trust_remote_code=False a released LLaDA folder makes it ask on stdin.
    # An empty config keeps it from looking for `llada` among the model types that it knows.
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, config=PreTrainedConfig())
    except Exception as error:  # the tokenizers library has none of its own; all mean the same to the user
        raise ValueError(f"{directory}: the tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error
    config = model_config(source)
    for name in ("mask_token_id", "pad_token_id", "eos_token_id"):
        theirs, ours = getattr(tokenizer, name, None), getattr(config, name)
        if theirs is not None and theirs != ours:
            raise ValueError(
                f"{directory}: {name} is {theirs} in tokenizer_config.json and {ours} in config.json; mend one of them"
            )
    rows, vocabulary = config.vocab_size, tokenizer.get_vocab()
    last = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[last] >= rows:
        raise ValueError(
            f"{directory}: token {last!r} has id {vocabulary[last]}, the model has {rows} rows of embedding; "
            "resize the model or take the token out of tokenizer.json"
        )
    return tokenizer


def unwritable_token_ids(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[int]:
    """Ids that are no text: special tokens (mask, pad, headers, ends), and embedding rows without a token."""
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return sorted({*special, *tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)})
