"""`retrofit export`: a folder that loads with torch and transformers alone.

It holds the weights, config.json with the schedules, the ids, the base and the `auto_map` of the code that loads it,
generation settings, the tokenizer's files, of the room `flexmdm/` the files that are needed, and a model card. There is
no manifest: the folder is the user's to edit, and the Hub has digests of its own.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from transformers import GenerationConfig
from transformers.dynamic_module_utils import get_relative_import_files

import retrofit.flexmdm
from retrofit.checkpoints import loading
from retrofit.checkpoints.loading import Source
from retrofit.checkpoints.weights import Files, write_files
from retrofit.data.tiny import released_config
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.configuration import FLEXMDM_AUTO_MAP, LLADA_AUTO_MAP
from retrofit.flexmdm.modeling import NEW_MODULES

from .card import Stated, make_card
from .whole import DTYPES, held, new_directory, parse_size, refuse_existing, whole, write_whole

_ROOM = Path(retrofit.flexmdm.__file__).parent


def export(
    path: str,
    dest: Path,
    *,
    revision: str | None = None,
    shard_size: str = "5GB",
    dtype: str | None = None,
    base_only: bool = False,
    stated: Stated | None = None,
) -> None:
    """Writes a stand-alone folder.

    Args:
        path: run, checkpoint, adapter (which is merged on the way), whole weights or Hub id: see `loading.resolve`.
        dest: must not exist; it appears when it is complete.
        dtype: a name of DTYPES; None keeps the backbone's own.
        base_only: leave out what makes the model a FlexMDM: a plain LLaDA in the released layout is written.
        stated: for the card, what no file says.

    Raises:
        ValueError: nothing loadable at `path`, its files do not fit together, dest exists, or the card's metadata would
            not be valid.
    """
    refuse_existing(dest)
    stated = stated or Stated()
    stated.check()
    most = parse_size(shard_size)
    source = loading.resolve(path, revision)
    with held(source):
        config = loading.model_config(source)
        plain = base_only or not isinstance(config, FlexMDMConfig)
        model, weights = whole(source, None if dtype is None else DTYPES[dtype], NEW_MODULES if plain else ())
        card = make_card(source, config, stated, name=dest.name, plain=plain, weights=weights)
        if stated.base_model and not plain:
            model.config.base_model = stated.base_model
        with new_directory(dest) as directory:
            write_files(directory, dict(card))
            write_files(directory, _tokenizer_files(source))
            write_files(directory, _plain_files(model.config) if plain else _flexmdm_files(model.config))
            write_whole(directory, weights, most)
    kind = "a plain LLaDA" if plain else "a FlexMDM"
    print(f"written   {dest}: {kind} in {str(model.config.dtype).removeprefix('torch.')}, with the code that loads it")


def _flexmdm_files(config: FlexMDMConfig) -> Files:
    """What stands beside a FlexMDM's weights and tokenizer."""
    config.auto_map = dict(FLEXMDM_AUTO_MAP)
    ids = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return {
        "config.json": config.to_json_string(use_diff=True).encode(),
        "generation_config.json": ids.to_json_string(use_diff=True).encode(),
        **_code("modeling.py"),
    }


def _plain_files(config: LLaDAConfig) -> Files:
    """What stands beside a LLaDA's weights and tokenizer: the released config.json, every field of it."""
    names = [name for name in inspect.signature(LLaDAConfig).parameters if name != "kwargs"]
    fields = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    fields |= {"torch_dtype": str(config.dtype).removeprefix("torch."), "auto_map": LLADA_AUTO_MAP}
    return {"config.json": (json.dumps(released_config(**fields), indent=2) + "\n").encode(), **_code("llada.py")}


def _tokenizer_files(source: Source) -> Files:
    """The tokenizer's files, by the class name that every version of transformers knows."""
    files = loading.tokenizer_files(source)
    settings = files.get("tokenizer_config.json", b"")
    files["tokenizer_config.json"] = settings.replace(b'"TokenizersBackend"', b'"PreTrainedTokenizerFast"')
    return {name: content for name, content in files.items() if content}


def _code(entry: str) -> dict[str, bytes]:
    """The file of the room that the auto_map names, and all that it imports from there."""
    paths = [_ROOM / entry, *map(Path, get_relative_import_files(_ROOM / entry))]
    return {path.name: path.read_bytes() for path in paths}
