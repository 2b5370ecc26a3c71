"""What a run says of itself, as far as others may read it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from retrofit.checkpoints import checkpoint
from retrofit.data.store import Manifest

# Rated power of one device in watts, by the name that torch gives it. Any other is left out of the estimate.
WATTS = {
    "NVIDIA H200": 700,
    "NVIDIA H100 80GB HBM3": 700,
    "NVIDIA H100 PCIe": 350,
    "NVIDIA H100 NVL": 400,
    "NVIDIA A100-SXM4-80GB": 400,
    "NVIDIA A100-SXM4-40GB": 400,
    "NVIDIA A100 80GB PCIe": 300,
    "NVIDIA A100-PCIE-40GB": 250,
    "NVIDIA L40S": 350,
    "NVIDIA L4": 72,
    "NVIDIA GeForce RTX 4090": 450,
    "NVIDIA GeForce RTX 3090": 350,
    "Tesla V100-SXM2-32GB": 300,
    "Tesla V100-SXM2-16GB": 300,
}
_PATH = re.compile(
    r"""(?P<url>\b(?!file:)\w+://\S+)|(?:file:|~|\.\.?|(?<![\w./~]))/[^\s'"`;,|<>()\[\]{}]+|\b[A-Za-z]:\\[^\s'"`;,|<>]+"""
)
_OF_A_RUN = re.compile(r"final|checkpoints|adapter|step-\d+")


@dataclass(frozen=True)
class Facts:
    """A run up to a step.

    Attributes:
        recipe: sections of recipe.yaml, without paths.
        step: of the weights; None where nothing says it.
        train, held_out: records of log.jsonl up to that step. samples: of samples.jsonl.
        machines: hardware of each start of the run (see `environment.hardware`), each different one once.
        packages, commit: of the first start.
        processes: how many trained, None where no checkpoint says it.
        parent: what training started from: a Hub id with its revision, or a last name.
        data: the manifest of the training data, if the store is still what and where it was.
    """

    recipe: dict[str, Any]
    step: int | None
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    machines: list[dict[str, Any]]
    packages: dict[str, str]
    commit: str | None
    processes: int | None
    parent: str | None
    data: Manifest | None

    @property
    def last(self) -> dict[str, Any]:
        """The last training record, {} without any."""
        return self.train[-1] if self.train else {}

    @property
    def seconds(self) -> float | None:
        """Time spent in training steps: without evaluation, sampling and saving. None where it was not logged."""
        total, before = 0.0, 0
        for record in self.train:
            if not isinstance(record.get("seconds_per_step"), float):
                return None
            total += (record["step"] - before) * record["seconds_per_step"]
            before = record["step"]
        return total or None

    @property
    def watts(self) -> int | None:
        """Rated power of all devices; None on a CPU, of unknown devices, or where devices changed on the way."""
        names = {gpu.get("name") for machine in self.machines for gpu in machine.get("gpus", [])}
        known = WATTS.get(str(names.pop())) if len(names) == 1 else None
        return known * self.processes if known and self.processes else None


def run_of(directory: Path) -> Path | None:
    """The run that a directory with weights belongs to: it is its final/, a checkpoint, or an adapter in one."""
    folder = directory.resolve()
    folder = folder.parent if folder.name == "adapter" else folder
    if folder.name == "final":
        run = folder.parent
    elif checkpoint.step_of(folder) is not None and folder.parent.name == "checkpoints":
        run = folder.parent.parent
    else:
        return None
    return run if (run / "recipe.yaml").is_file() else None


def read(directory: Path) -> Facts | None:
    """What the run of a directory with weights says; None where it is of no run.

    Lines of the logs that cannot be read are passed over.

    Raises:
        ValueError: recipe.yaml is broken.
    """
    run = run_of(directory)
    if run is None:
        return None
    folder = directory.resolve()
    step = checkpoint.step_of(folder.parent if folder.name == "adapter" else folder)
    log = _lines(run / "log.jsonl", step)
    train = [record for record in log if record.get("kind") == "train"]
    if step is None and train:
        step = train[-1]["step"]
    record = _record(run, folder)
    environments = [_json(path) for path in [run / "environment.json", *sorted(run.glob("environment-step-*.json"))]]
    machines: list[dict[str, Any]] = []
    for hardware in (environment.get("hardware") for environment in environments):
        if isinstance(hardware, dict) and hardware not in machines:
            machines.append(hardware)
    recipe = _recipe(run / "recipe.yaml")
    parent = _parent(record.get("parent"))
    data = _manifest(recipe, record.get("data_digest"))
    return Facts(
        recipe=_public(recipe, parent),
        step=step,
        train=train,
        held_out=[record for record in log if record.get("kind") == "held_out"],
        samples=_lines(run / "samples.jsonl", step),
        machines=machines,
        packages=environments[0].get("packages") or {},
        commit=(environments[0].get("git") or {}).get("commit"),
        processes=record.get("world_size"),
        parent=parent,
        data=data,
    )


def without_paths(text: str) -> str:
    """The text with every path that begins at a root, a home or a dot cut to its last name."""
    return _PATH.sub(lambda match: match["url"] or last_name(match.group()), text)


def last_name(path: str) -> str:
    """`toy` for /home/me/runs/toy, and for runs/toy/final and runs/toy/checkpoints/step-00000200 too."""
    names = [name for name in re.split(r"[/\\]", path) if name not in ("", ".", "..", "~")]
    while len(names) > 1 and _OF_A_RUN.fullmatch(names[-1]):
        names.pop()
    return names[-1] if names else ""


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if isinstance(values, dict) else {}
    return {}


def _lines(path: Path, step: int | None) -> list[dict[str, Any]]:
    """The records of a log up to a step."""
    records = []
    with suppress(OSError):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    records.append(record)
    return [record for record in records if step is None or record["step"] <= step]


def _record(run: Path, folder: Path) -> dict[str, Any]:
    """What a checkpoint recorded beside its weights: its own, or for final/ that of the newest one."""
    own = folder.parent if folder.name == "adapter" else folder
    for place in (own, *reversed(checkpoint.steps_present(run / "checkpoints"))):
        with suppress(OSError, ValueError):
            return dict(checkpoint.read_record(place))
    return {}


def _recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ValueError(f"{path}: not a recipe ({' '.join(str(error).split())})") from error
    if not isinstance(recipe, dict) or not all(isinstance(section, dict | None) for section in recipe.values()):
        raise ValueError(f"{path}: not a recipe; expected sections with keys")
    return recipe


def _parent(parent: Any) -> str | None:
    """`owner/name at revision` of a parent from the Hub; else its last name."""
    if not isinstance(parent, dict) or not isinstance(parent.get("name"), str):
        return None
    digest = str(parent.get("digest"))
    return digest.removeprefix("hub:").replace("@", " at ") if digest.startswith("hub:") else last_name(parent["name"])


def _manifest(recipe: Mapping[str, Any], digest: Any) -> Manifest | None:
    """The manifest of the store at the recipe's path, if it is that which was trained on."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        manifest = Manifest.read(Path(recipe["data"]["path"]))
        return manifest if manifest.digest == digest else None
    return None


def _public(recipe: Mapping[str, Any], parent: str | None) -> dict[str, Any]:
    """The recipe with last names for its paths. A Hub id stays, if the run recorded that it is one."""
    public = _each_text(recipe)
    for section, name in (("model", "init_from"), ("data", "path"), ("training", "output_dir")):
        given = (recipe.get(section) or {}).get(name)
        if isinstance(given, str) and not (parent or "").startswith(f"{given} at "):
            public[section][name] = last_name(given)
    return public


def _each_text(value: Any) -> Any:
    if isinstance(value, str):
        return without_paths(value)
    if isinstance(value, Mapping):
        return {name: _each_text(item) for name, item in value.items()}
    return [_each_text(item) for item in value] if isinstance(value, list) else value
