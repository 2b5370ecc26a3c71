"""`retrofit validate`: every check of a run that can be made before it stands in a queue. Changes nothing on disk."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from retrofit.checkpoints import checkpoint
from retrofit.data.store import TokenStore
from retrofit.recipe import Recipe, load_recipe
from retrofit.training import start
from retrofit.training.deepspeed_config import resolve
from retrofit.training.log import check_trackers
from retrofit.training.preflight import check_space, checkpoint_bytes, gigabytes
from retrofit.training.run_directory import RunDirectory
from retrofit.training.samples import encode_prompts

DEFAULT_PORT = 29500


class _Skipped(Exception):
    """A check cannot be made here; the message says why."""


def validate(recipe: Recipe, *, launch: Path | None, num_processes: int | None, offline: bool) -> None:
    """Prints one line a check.

    Args:
        launch: accelerate config file, or None for a run of one process.
        num_processes: instead of the launch file's.
        offline: leave out what needs the Hub.

    Raises:
        ValueError: there are problems (how many; each has been printed).
    """
    problems = 0
    config: dict[str, Any] = {}
    found: dict[str, Any] = {}

    def check(name: str, work: Callable[[], str | None]) -> None:
        nonlocal problems
        try:
            print(f"{name:<10} ok       {work() or ''}".rstrip())
        except _Skipped as skipped:
            print(f"{name:<10} skipped  {skipped}")
        except (ValueError, OSError) as error:
            for line in str(error).splitlines():
                problems += 1
                print(f"{name:<10} problem  {line}")

    def launched() -> str:
        if launch is None:
            config.update({"num_processes": num_processes or 1})
        else:
            config.update(read_launch(launch))
            config["num_processes"] = num_processes or config.get("num_processes", 1)
        return check_launch_file(config, launch, recipe)

    def port() -> str:
        if launch is None or config.get("num_processes", 1) == 1:
            raise _Skipped("one process needs none")
        number = int(config.get("main_process_port") or DEFAULT_PORT)
        if config.get("main_process_ip"):
            raise _Skipped(f"{number} on {config['main_process_ip']} is seen only from there")
        with closing(socket.socket()) as probe:
            try:
                probe.bind(("", number))
            except OSError:
                raise ValueError(
                    f"port {number} is in use on this host; choose another with --main_process_port N"
                ) from None
        return str(number)

    def data() -> str:
        store = TokenStore.open(recipe.data.path, "train")
        store.verify()
        found["store"] = store
        if recipe.training.eval_steps is not None and not len(TokenStore.open(recipe.data.path, "held_out")):
            raise ValueError(f"training.eval_steps: {recipe.data.path} has no held-out documents; set it to null")
        return f"{len(store):,} documents"

    def model() -> str:
        if "store" not in found:
            raise _Skipped("without the data")
        if offline and not Path(recipe.model.init_from).exists():
            raise _Skipped(f"{recipe.model.init_from} is not here (--offline)")
        begin = found["begin"] = start.from_recipe(recipe, found["store"])
        return begin.describe()

    def samples() -> str:
        from retrofit.checkpoints.loading import load_tokenizer

        if recipe.training.sample_steps is None or "begin" not in found:
            raise _Skipped("none are drawn" if "begin" in found else "without the model")
        encode_prompts(load_tokenizer(found["begin"].source), recipe)
        return f"{len(recipe.sampling.prompts)} prompts"

    def space() -> str:
        if "begin" not in found:
            raise _Skipped("without the model")
        sizes = checkpoint_bytes(found["begin"], average=recipe.training.ema_decay is not None)
        warning = check_space(found["begin"], recipe)
        return f"a checkpoint takes {gigabytes(sizes.checkpoint)}" + (f"; but {warning}" if warning else "")

    check("launch", launched)
    check("port", port)
    check("trackers", lambda: check_trackers(recipe.training.report_to))
    check("data", data)
    check("model", model)
    check("samples", samples)
    check("directory", lambda: check_directory(recipe, found.get("store")))
    check("space", space)
    if problems:
        raise ValueError(f"{problems} problem{'s' if problems > 1 else ''}, see above")


def read_launch(path: Path) -> dict[str, Any]:
    """An accelerate config file. Raises ValueError where it is none."""
    try:
        config = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except YAMLError as error:
        raise ValueError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict) or "distributed_type" not in config:
        raise ValueError(f"{path}: not an accelerate config (no distributed_type)")
    return config


def check_launch_file(config: dict[str, Any], path: Path | None, recipe: Recipe) -> str:
    """Compares a launch with the recipe; says what it is. Raises ValueError with all that contradicts, a line each."""
    problems: list[str] = []
    processes = config["num_processes"]
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise ValueError(f"{path}: num_processes: expected an integer of at least 1, found {processes!r}")
    kind = str(config.get("distributed_type", "NO"))
    if kind == "MULTI_CPU" or (config.get("use_cpu") and processes > 1):
        problems.append(
            f"{path}: distributed_type {kind} starts one process where {processes} are asked for; use MULTI_GPU, which "
            "serves CPUs too"
        )
    elif kind not in ("NO", "MULTI_GPU", "DEEPSPEED", "FSDP"):
        problems.append(f"{path}: distributed_type {kind} is not supported; use MULTI_GPU, DEEPSPEED or FSDP")
    if kind == "NO" and processes > 1:
        problems.append(f"{path}: distributed_type NO with num_processes {processes}; use MULTI_GPU")
    precision = str(config.get("mixed_precision", "no")).lower()
    if precision not in ("no", "false", "bf16" if recipe.training.bf16 else "no"):
        problems.append(
            f"{path}: mixed_precision is {precision} and training.bf16 is {str(recipe.training.bf16).lower()} in the "
            "recipe; set the recipe's, and leave the other at no"
        )
    fsdp = config.get("fsdp_config") or {}
    if kind == "FSDP" and fsdp.get("fsdp_version", 1) != 2:
        problems.append(f"{path}: fsdp_config.fsdp_version is {fsdp.get('fsdp_version', 1)}; only 2 is supported")
    if kind == "FSDP" and fsdp.get("fsdp_offload_params"):
        problems.append(f"{path}: fsdp_config.fsdp_offload_params is not supported; remove it")
    if kind == "DEEPSPEED":
        problems += _check_deepspeed(config.get("deepspeed_config") or {}, path, recipe, processes)
    try:
        recipe.training.check_world_size(processes)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return f"{kind}, {processes} process{'es' if processes > 1 else ''}"


def _check_deepspeed(section: dict[str, Any], path: Path | None, recipe: Recipe, processes: int) -> list[str]:
    name = section.get("deepspeed_config_file")
    if not name:
        return [f"{path}: deepspeed_config needs deepspeed_config_file; see launch/accelerate/zero3.yaml"]
    try:
        config = json.loads(Path(name).read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not a mapping")
    except OSError as error:
        return [f"{name}: {error.strerror} (named in {path}; paths are relative to where the command runs)"]
    except ValueError as error:
        return [f"{name}: not a JSON file ({error})"]
    try:
        resolve(config, name, recipe, processes)
    except ValueError as error:
        return str(error).splitlines()
    return []


def check_directory(recipe: Recipe, store: TokenStore | None) -> str:
    """Whether the run could take its directory, and what it would do there. Raises ValueError where it could not."""
    run = RunDirectory(Path(recipe.training.output_dir))
    place = run.path.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"training.output_dir: {place} cannot be written; choose another directory")
    run.check_free()
    newest, passed_over = checkpoint.latest(run.checkpoints)
    if newest is None:
        if passed_over:
            raise ValueError(f"training.output_dir: no checkpoint in {run.checkpoints} verifies; see retrofit verify")
        if (run.path / "recipe.yaml").is_file():
            start.check_same_run(asdict(recipe), asdict(load_recipe(run.path / "recipe.yaml")), run.path)
        return "a new run"
    record = checkpoint.read_record(newest)
    start.check_same_run(asdict(recipe), record["recipe"], run.path)
    if store is not None:
        start.check_same_data(store, record, newest)
    return f"goes on from {newest.name}"
