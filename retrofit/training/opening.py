"""What comes before the first step: taking the run directory, finding what is to be done, writing a run's first files.

Refusals come first: nothing of the user's is changed until everything has been found to fit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from retrofit.checkpoints import checkpoint, loading
from retrofit.data.store import TokenStore
from retrofit.environment import environment
from retrofit.recipe import Recipe, dump_recipe, load_recipe

from . import start
from .engine import Engine
from .guard import announce
from .log import check_trackers
from .run_directory import RunDirectory
from .samples import encode_prompts
from .start import Start

COMPLETE = "complete"
"""What `open_run` says of a run that has nothing left to do."""


def check_recipe(recipe: Recipe, engine: Engine, run: RunDirectory) -> None:
    """Refuses trackers that cannot report, and batch sizes that do not multiply to documents_per_step.

    A run that goes on may do so with another number of processes: then the batch sizes are dropped, and that is said.
    """
    check_trackers(recipe.training.report_to)
    try:
        recipe.training.check_world_size(engine.world_size)
    except ValueError:
        if not run.holds_run():
            raise
        if engine.is_main:
            announce(
                f"per_device_train_batch_size and gradient_accumulation_steps do not fit {engine.world_size} processes "
                f"and are dropped; a step stays {recipe.training.documents_per_step} documents"
            )


def open_run(recipe: Recipe, run: RunDirectory) -> str | None:
    """Takes the run directory and finds what is to be done in it, changing nothing.

    Returns:
        the checkpoint to resume, None to start at step 0, or `COMPLETE`.
    """
    dead = run.acquire()
    if dead:
        announce(f"{run.path} was held by {dead}, which ended without letting go of it; taken over")
    store = TokenStore.open(recipe.data.path, "train")
    newest, passed_over = checkpoint.latest(run.checkpoints)
    for directory, reason in passed_over:
        announce(f"{directory} is passed over: {reason}")
    if newest is None:
        if passed_over:
            raise ValueError(
                f"training.output_dir: no checkpoint in {run.checkpoints} verifies; choose another directory"
            )
        if (run.path / "recipe.yaml").is_file():
            start.check_same_run(asdict(recipe), asdict(load_recipe(run.path / "recipe.yaml")), run.path)
        # Checkpoints may have been deleted to save space: what is finished is not trained again.
        return COMPLETE if checkpoint.find_problem(run.final) is None else None
    record = checkpoint.read_record(newest)
    start.check_same_run(asdict(recipe), record["recipe"], run.path)
    start.check_same_data(store, record, newest)
    if record["step"] >= recipe.training.max_steps and checkpoint.find_problem(run.final) is None:
        return COMPLETE
    announce(f"resuming {newest}")
    return str(newest)


def load_start(recipe: Recipe, store: TokenStore, resumed: str | None) -> Start:
    if resumed is None:
        return start.from_recipe(recipe, store)
    return start.from_checkpoint(recipe, Path(resumed), checkpoint.read_record(Path(resumed)), store)


def check_base(begin: Start, resumed: str | None) -> None:
    """Refuses to go on with an adapter over other frozen weights than those it was trained over."""
    if resumed is None or begin.adapter is None:
        return
    begin.digest_base()
    if begin.base_digest != checkpoint.read_record(Path(resumed))["base_digest"]:
        raise ValueError(
            f"{begin.base[0]}: these are not the weights that the adapter in {resumed} was trained over; "
            "put the base back to resume, or choose another training.output_dir"
        )


def open_extras(recipe: Recipe, begin: Start) -> tuple[TokenStore | None, PreTrainedTokenizerBase | None]:
    """The held-out documents and the tokenizer for samples, where the recipe asks for either."""
    held_out, tokenizer = None, None
    if recipe.training.eval_steps is not None:
        held_out = TokenStore.open(recipe.data.path, "held_out")
        if len(held_out) == 0:
            raise ValueError(
                f"training.eval_steps: {recipe.data.path} has no held-out documents; set it to null, or keep some back"
            )
    if recipe.training.sample_steps is not None:
        tokenizer = loading.load_tokenizer(begin.source)
        encode_prompts(tokenizer, recipe)
    return held_out, tokenizer


def write_preamble(recipe: Recipe, run: RunDirectory, begin: Start, resumed: str | None) -> None:
    """Writes what stands in a run before its first step, and sets aside log lines of steps that will be taken again."""
    announce(begin.describe())
    step = 0 if resumed is None else checkpoint.read_record(Path(resumed))["step"]
    aside = run.set_aside(step if resumed else -1)
    if aside:
        announce(f"log lines past step {step} are set aside in {aside}")
    temporary = run.path / f"{checkpoint.TEMPORARY}recipe.yaml"
    dump_recipe(recipe, temporary)
    temporary.replace(run.path / "recipe.yaml")  # first: from here on the directory is known to be a run
    name = "environment.json" if resumed is None else f"environment-{checkpoint.step_name(step)}.json"
    checkpoint.write_text(run.path / name, json.dumps(environment(), indent=2) + "\n")
    if resumed is None:
        shutil.rmtree(run.path / start.BASE, ignore_errors=True)  # of a start that was cut short
        begin.write_merged_base()
        begin.digest_base()
