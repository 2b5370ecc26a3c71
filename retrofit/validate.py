"""Checks before the queue: all that training would refuse, found without a GPU, all at once, changing nothing on disk.

One line is printed for each check: `ok`, `warning`, `problem`, or `skipped` with the reason. The checks are training's
own; what cannot be known here (a model that is not on this machine, another node's port) is skipped and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from retrofit.checkpoints import checkpoint, loading
from retrofit.data.store import TokenStore
from retrofit.recipe import Recipe, load_recipe
from retrofit.training import start
from retrofit.training.launch_file import LaunchFile
from retrofit.training.log import check_trackers
from retrofit.training.opening import check_base, find_start, open_extras
from retrofit.training.preflight import check_space, checkpoint_bytes, gigabytes
from retrofit.training.run_directory import RunDirectory
from retrofit.training.start import Start

T = TypeVar("T")


class Skipped(Exception):
    """A check that cannot be made here. The message says why."""


def validate(
    path: Path, overrides: Sequence[str] = (), *, launch: Path | None = None, num_processes: int | None = None
) -> None:
    """Checks a recipe with all that it names, and prints a line for each check.

    Args:
        launch: the accelerate config file that the recipe is to be launched with.
        num_processes: over all machines, where not the launch file's number; 1 without a launch file.

    Raises:
        ValueError: there are problems (how many; they are printed).
    """
    report = _Report()
    recipe = report.check("recipe", lambda: load_recipe(path, overrides), lambda _: str(path))
    _check_launch(report, recipe, launch, num_processes)
    if recipe is None:
        report.say("skipped", "everything else", "needs the recipe")
    else:
        _check_recipe(report, recipe)
    if report.problems:
        count = f"{report.problems} problem{'s' if report.problems > 1 else ''}"
        raise ValueError(f"{path}: {count} found; training would be refused")


class _Report:
    """Prints what comes of each check, and counts the problems."""

    def __init__(self) -> None:
        self.problems = 0

    def say(self, state: str, what: str, text: str) -> None:
        print(f"{state:8} {what}: {text}", flush=True)

    def check(self, what: str, work: Callable[[], T], describe: Callable[[T], str]) -> T | None:
        """The result of a check, None where it was not passed."""
        try:
            result = work()
        except Skipped as reason:
            self.say("skipped", what, str(reason))
        except (ValueError, OSError) as error:
            strerror = error.strerror if isinstance(error, OSError) else None
            text = f"{error.filename}: {strerror}" if isinstance(error, OSError) and strerror else str(error)
            for line in text.splitlines():
                self.problems += 1
                self.say("problem", what, line)
        else:
            self.say("ok", what, describe(result))
            return result
        return None


def _check_launch(report: _Report, recipe: Recipe | None, path: Path | None, processes: int | None) -> None:
    goes_on = recipe is not None and RunDirectory(Path(recipe.training.output_dir)).holds_run()
    if path is None:
        report.say("skipped", "launch file", "none given (--launch)")
        if recipe is not None and not goes_on:
            count = processes or 1
            report.check("batch sizes", lambda: recipe.training.check_world_size(count), lambda _: f"fit {count} ranks")
        return
    file = report.check(
        "launch file", lambda: LaunchFile.read(path, processes), lambda file: f"{path}, {file.processes} processes"
    )
    if file is None:
        return
    if recipe is not None:
        report.check("launch file and recipe", lambda: file.check(recipe, goes_on=goes_on), lambda _: "fit together")

    def port() -> int:
        if file.fields["distributed_type"] == "NO":
            raise Skipped("one process needs none")
        if file.machines > 1:
            raise Skipped("it is the first of several machines that needs it")
        return file.check_port()

    report.check("port", port, lambda found: f"{found} is free on this machine")

    def devices() -> int:
        found, wanted = torch.cuda.device_count(), file.processes // max(1, file.machines)
        if found == 0:
            raise Skipped("no GPU on this machine")
        if found < wanted:
            raise Skipped(f"{wanted} are needed on each machine, this one has {found}")
        return found

    report.check("GPUs", devices, lambda found: f"{found} on this machine")


def _check_recipe(report: _Report, recipe: Recipe) -> None:
    report.check("trackers", lambda: check_trackers(recipe.training.report_to), lambda _: _listed(recipe))
    store = report.check("data", lambda: _open_store(recipe), _describe_store)
    run = RunDirectory(Path(recipe.training.output_dir))
    free = report.check("output directory", run.look, str)
    resumed = report.check("run", lambda: _find_run(recipe, run, store), _describe_run) if free else None
    if store is None:
        report.say("skipped", "model", "needs the data")
        return
    begin = _check_model(report, recipe, store, Path(resumed) if resumed else None)
    if begin is None:
        report.say("skipped", "samples, checkpoints, space", "need the model")
        return
    report.check("held-out documents and samples", lambda: open_extras(recipe, begin), lambda _: "can be had")
    size = checkpoint_bytes(begin, average=recipe.training.ema_decay is not None)
    text = f"{gigabytes(size.checkpoint)} each, {gigabytes(size.state)} of it training state; final/ takes "
    report.say("ok", "checkpoints", text + gigabytes(size.weights))
    warning: list[str] = []

    def space() -> str:
        found = check_space(begin, recipe)
        if found:
            warning.append(found)
        return "not for all checkpoints" if found else "enough"

    report.check("space", space, str)
    for text in warning:
        report.say("warning", "space", text)


def _listed(recipe: Recipe) -> str:
    return ", ".join(["log.jsonl", *recipe.training.report_to])


def _open_store(recipe: Recipe) -> TokenStore:
    """The training split, the contents of all splits verified."""
    store = TokenStore.open(recipe.data.path, "train")
    for split in store.manifest.splits:
        TokenStore.open(recipe.data.path, split).verify()  # type: ignore[arg-type]
    return store


def _describe_store(store: TokenStore) -> str:
    record = store.manifest.splits["train"]
    return f"{store.path}, {record.documents:,} documents of {record.tokens:,} tokens for training, digests verified"


def _find_run(recipe: Recipe, run: RunDirectory, store: TokenStore | None) -> Path | str:
    """The checkpoint to go on from, or the empty text where the directory holds no run."""
    newest, passed_over = checkpoint.latest(run.checkpoints)
    if newest is None and passed_over:
        raise ValueError(f"training.output_dir: no checkpoint in {run.checkpoints} verifies ({passed_over[0][1]})")
    if newest is None:
        if (run.path / "recipe.yaml").is_file():
            start.check_same_run(asdict(recipe), asdict(load_recipe(run.path / "recipe.yaml")), run.path)
        return ""
    record = checkpoint.read_record(newest)
    start.check_same_run(asdict(recipe), record["recipe"], run.path)
    if store is not None:
        start.check_same_data(store, record, newest)
    return newest


def _describe_run(found: Path | str) -> str:
    return f"goes on from {found}" if found else "starts at step 0"


def _check_model(report: _Report, recipe: Recipe, store: TokenStore, resumed: Path | None) -> Start | None:
    """The start of a run, built on the meta device; None where something keeps it from being built.

    A run that goes on is built from its checkpoint: `model.init_from` is not asked for again.
    """
    if resumed is None and not _check_source(report, recipe, store):
        return None
    begin = report.check("weights", lambda: find_start(recipe, store, resumed), lambda begin: begin.describe())
    if begin is not None and resumed is not None:
        report.check("base of the run", lambda: check_base(begin, resumed), lambda _: "unchanged")
    return begin


def _check_source(report: _Report, recipe: Recipe, store: TokenStore) -> bool:
    """Whether what a new run starts from is there and fits."""
    source = report.check("model", lambda: _find_model(recipe), lambda source: f"{source.name} ({source.kind})")
    if source is None:
        return False
    config = report.check("configuration", lambda: loading.model_config(source), lambda config: config.model_type)
    if config is None:
        return False
    before = report.problems
    for what, work in start.checks(recipe, store, source, config).items():
        report.check(what, work, lambda _: "fits")
    return report.problems == before


def _find_model(recipe: Recipe) -> loading.Source:
    name = recipe.model.init_from
    try:
        return loading.resolve(name, recipe.model.revision)
    except ValueError:
        if not Path(name).exists() and loading.is_hub_id(name):
            raise Skipped(
                f"{name} is no directory here, and as a Hub id has not been downloaded to this machine"
            ) from None
        raise
