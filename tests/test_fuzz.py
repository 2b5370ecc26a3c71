"""What comes in from outside, changed at random: every reader refuses it with a clean error or reads it.

Clean is what the command line turns into one line: a ValueError or OSError. RETROFIT_FUZZ is the number of inputs for
each reader (`make fuzz`: 10,000); inputs that failed once stand as explicit examples.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from retrofit.checkpoints import adapters, checkpoint, loading
from retrofit.checkpoints.weights import TensorFiles, full_readers, weight_files
from retrofit.data.sources import open_source
from retrofit.data.store import TokenStore
from retrofit.hub import reference
from retrofit.recipe import load_recipe

INPUTS = int(os.environ.get("RETROFIT_FUZZ", "60"))


def load_config(folder: Path) -> None:
    loading.model_config(loading.resolve(folder))


def load_tensors(folder: Path) -> None:
    files = TensorFiles(weight_files(folder))
    model = loading.on_meta(loading.model_config(loading.resolve(folder)), next(iter(files.dtypes.values())))
    for read in full_readers(model, folder, files).values():
        read()


def read_rows(folder: Path) -> None:
    for _ in open_source(str(folder / "rows.jsonl")):
        pass


READERS: dict[str, Callable[[Path], Any]] = {
    "config.json": load_config,
    "model.safetensors": load_tensors,
    "model.safetensors.index.json": lambda folder: TensorFiles(weight_files(folder)),
    "tokenizer_config.json": lambda folder: loading.load_tokenizer(loading.resolve(folder)),
    "tokenizer.json": lambda folder: loading.load_tokenizer(loading.resolve(folder)),
    "adapter_config.json": adapters.read_adapter_config,
    "retrofit_manifest.json": lambda folder: checkpoint.find_problem(folder),
    "published.bin": lambda folder: reference.read_published(folder / "published.bin"),
    "manifest.json": TokenStore.open,
    "rows.jsonl": read_rows,
    "recipe.yaml": lambda folder: load_recipe(folder / "recipe.yaml", []),
}


@pytest.fixture(scope="module")
def sound(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """File that is changed -> a folder in which everything is right."""
    import torch

    root = tmp_path_factory.mktemp("sound")
    folders = {name: root / name for name in READERS}
    for name, folder in folders.items():
        shutil.copytree(toy / ("store" if name == "manifest.json" else "model"), folder)
    index = folders["model.safetensors.index.json"]
    names = TensorFiles([index / "model.safetensors"]).shapes
    (index / "model.safetensors").rename(index / "model-1.safetensors")
    content = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    (index / "model.safetensors.index.json").write_text(json.dumps(content))
    settings_ = adapters.AdapterSettings(4, 8.0, 0.1, ("q_proj",))
    files = adapters.adapter_files({}, settings_, base_model=str(toy / "model"), base_revision=None)
    (folders["adapter_config.json"] / "adapter_config.json").write_bytes(bytes(files["adapter_config.json"]))  # type: ignore[arg-type]
    held = folders["retrofit_manifest.json"]
    checkpoint.write_directory(held / "step", lambda path: save_file({"x": torch.ones(2)}, path / "x.safetensors"))
    folders["retrofit_manifest.json"] = held / "step"
    torch.save({"backbone.x": torch.ones(3)}, folders["published.bin"] / "published.bin")
    rows = [{"question": "How many?", "answer": "2 #### 2"}, {"text": "a \\u2028 b"}]
    (folders["rows.jsonl"] / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Path(__file__).parents[1] / "recipes" / "toy" / "gsm8k.yaml"
    shutil.copyfile(recipe, folders["recipe.yaml"] / "recipe.yaml")
    return folders


def changed_bytes(content: bytes, draw: Callable[..., Any]) -> bytes:
    """A stretch replaced, doubled, cut out, or everything after it cut off."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(len(content), start + 40)))
    kind = draw(st.sampled_from(("replace", "double", "cut")))
    middle = {"replace": draw(st.binary(max_size=12)), "double": content[start:end] * 2, "cut": b""}[kind]
    return content[:start] + middle + (b"" if draw(st.integers(0, 9)) == 0 else content[end:])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


def changed_json(content: bytes, draw: Callable[..., Any]) -> bytes:
    """A value, somewhere in it, replaced by anything or taken out; or a field more."""
    root = json.loads(content)
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    walk(root)
    node, key = draw(st.sampled_from(places[:200]))
    kind = draw(st.sampled_from(("replace", "replace", "delete", "add", "root")))
    if kind == "root":
        return json.dumps(draw(ANYTHING)).encode()
    if kind == "add" and isinstance(node, dict):
        node[draw(st.text(max_size=8))] = draw(ANYTHING)
    elif kind == "delete":
        del node[key]
    else:
        node[key] = draw(ANYTHING)
    return json.dumps(root).encode()


@pytest.mark.parametrize("name", READERS)
def test_whatever_comes_in_is_read_or_refused_cleanly(name: str, sound: dict[str, Path]) -> None:
    folder = sound[name]
    path = folder / (checkpoint.MANIFEST if name == "retrofit_manifest.json" else name)
    content = path.read_bytes()
    READERS[name](folder)

    @settings(
        max_examples=INPUTS, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
    )
    @given(st.data())
    def fuzz(data: Any) -> None:
        change = changed_json if path.suffix == ".json" and data.draw(st.booleans()) else changed_bytes
        changed = change(content, data.draw)
        path.unlink()  # what is mapped must not change under its readers
        path.write_bytes(changed)
        try:
            READERS[name](folder)
        except (ValueError, OSError) as error:
            assert str(error).strip(), "an error that says nothing"

    fuzz()
