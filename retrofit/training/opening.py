"""What comes before the first step: taking the run directory, finding what is to be done, writing a run's first files.

Refusals come first: nothing of the user's is changed until everything has been found to fit.
"""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from retrofit.checkpoints import checkpoint, loading
from retrofit.data.store import TokenStore
from retrofit.environment import environment
from retrofit.recipe import Recipe, dump_recipe, load_recipe

from . import start
from .guard import announce
from .log import check_trackers
from .preflight import check_space
from .processes import Processes
from .run_directory import RunDirectory
from .samples import encode_prompts
from .start import Start


@dataclass(frozen=True)
class Request:
    """What the command line says about going on.

    Attributes:
        resume_from: a run, a checkpoint, or a bare step of this run; None: the newest good checkpoint of this run.
        fresh: start anew; what the directory holds is moved aside.
        overrides: recipe fields (`section.field`) that may differ from the run's although they change the mathematics.
    """

    resume_from: str | None = None
    fresh: bool = False
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.fresh and self.resume_from is not None:
            raise ValueError("--fresh starts anew and --resume_from goes on; give one of them")


@dataclass(frozen=True)
class Opened:
    """What is to be done in a run directory.

    Attributes:
        resumed: the checkpoint to go on from, None to start at step 0.
        complete: nothing is left to do.
        overridden: the fields whose change was asked for, `section.field` -> [was, is].
    """

    resumed: Path | None = None
    complete: bool = False
    overridden: dict[str, list[Any]] = field(default_factory=dict)


def check_recipe(recipe: Recipe, processes: Processes, run: RunDirectory) -> None:
    """Refuses trackers that cannot report, and batch sizes that do not multiply to documents_per_step.

    A run that goes on may do so with another number of processes: then the batch sizes are dropped, and that is said.
    """
    check_trackers(recipe.training.report_to)
    try:
        recipe.training.check_world_size(processes.world_size)
    except ValueError:
        if not run.holds_run():
            raise
        if processes.is_main:
            announce(
                "per_device_train_batch_size and gradient_accumulation_steps do not fit "
                f"{processes.world_size} processes "
                f"and are dropped; a step stays {recipe.training.documents_per_step} documents"
            )


def take_directory(run: RunDirectory, processes: Processes, *, fresh: bool) -> None:
    """Takes the run directory for this job, and makes sure that every rank sees the same one.

    Raises:
        ValueError: a live process holds it, or a host does not see what rank 0 wrote there (named).
    """

    def take() -> str:
        dead = run.acquire()
        if dead:
            announce(f"{run.path} was held by {dead}, which ended without letting go of it; taken over")
        if fresh and run.holds_run():
            announce(f"--fresh: what {run.path} held is moved to {run.set_everything_aside()}")
        return run.write_nonce()

    nonce = processes.on_main(take)
    blind = [
        f"{host} (rank {rank})"
        for rank, (host, seen) in enumerate(processes.gather((socket.gethostname(), run.sees_nonce(nonce))))
        if not seen
    ]

    def refuse_blind_hosts() -> None:
        run.remove_nonce()
        if blind:
            raise ValueError(
                f"training.output_dir: {run.path} is not the same directory on all hosts: {', '.join(blind)} cannot "
                "see what rank 0 wrote there; put it on a file system that all of them share"
            )

    processes.on_main(refuse_blind_hosts)


def open_run(
    recipe: Recipe, run: RunDirectory, processes: Processes, request: Request, alive: Callable[[], None]
) -> Opened:
    """Finds what is to be done in a run directory that this job holds, changing nothing. Called by all ranks."""
    store = processes.together(lambda: TokenStore.open(recipe.data.path, "train"))
    newest = _choose(run, processes, request, alive)
    return processes.on_main(lambda: _fit(recipe, run, store, newest, request))


def _choose(run: RunDirectory, processes: Processes, request: Request, alive: Callable[[], None]) -> Path | None:
    """The newest checkpoint that verifies, or the one asked for. Ranks hash disjoint shares of its files."""
    candidates = processes.on_main(lambda: [str(path) for path in _candidates(run, request)])
    passed_over = 0
    for directory in map(Path, candidates):
        problem = _find_problem(directory, processes, alive)
        if problem is None:
            return directory
        passed_over += 1
        if processes.is_main:
            announce(f"{directory} is passed over: {problem}")
    if passed_over:
        what = request.resume_from or run.checkpoints

        def refuse() -> None:
            raise ValueError(
                f"training.output_dir: no checkpoint in {what} verifies; choose another directory, or start anew with "
                "--fresh, which moves it aside"
                if request.resume_from is None
                else f"--resume_from: {what} does not verify; choose another checkpoint"
            )

        processes.on_main(refuse)
    return None


def _find_problem(
    directory: Path,
    processes: Processes,
    alive: Callable[[], None],
    only: Callable[[str], bool] = lambda name: True,
) -> str | None:
    """As `checkpoint.find_problem`, by all ranks together, each of which hashes its share of the files."""
    share = checkpoint.shares(directory, processes.world_size)[processes.rank]
    mine = checkpoint.find_problem(directory, lambda name: name in share and only(name), on_bytes=lambda _: alive())
    return next((problem for problem in processes.gather(mine) if problem), None)


def _candidates(run: RunDirectory, request: Request) -> list[Path]:
    """Checkpoints to try, the best first."""
    if request.resume_from is None:
        return list(reversed(checkpoint.steps_present(run.checkpoints)))
    asked = request.resume_from
    path = run.checkpoints / checkpoint.step_name(int(asked)) if asked.isdigit() else Path(asked)
    if path.is_dir() and checkpoint.step_of(path) is None:
        found = list(reversed(checkpoint.steps_present(path / "checkpoints")))
        if not found:
            raise ValueError(f"--resume_from: {path} is neither a checkpoint nor a run that has one")
    elif path.is_dir():
        found = [path]
    else:
        present = ", ".join(str(checkpoint.step_of(item)) for item in checkpoint.steps_present(run.checkpoints))
        raise ValueError(f"--resume_from: there is no {path}; steps of this run: {present or 'none'}")
    if found[0].resolve().parent != run.checkpoints.resolve() and checkpoint.steps_present(run.checkpoints):
        raise ValueError(
            f"--resume_from: {run.path} holds a run of its own; choose another training.output_dir to go on from "
            f"{found[0]}, or add nothing to go on with the run that is there"
        )
    return found


def _fit(recipe: Recipe, run: RunDirectory, store: TokenStore, newest: Path | None, request: Request) -> Opened:
    if newest is None:
        if (run.path / "recipe.yaml").is_file():
            recorded = asdict(load_recipe(run.path / "recipe.yaml"))
            start.check_same_run(asdict(recipe), recorded, run.path, request.overrides)
        # Checkpoints may have been deleted to save space: what is finished is not trained again.
        return Opened(complete=checkpoint.find_problem(run.final) is None)
    record = checkpoint.read_record(newest)
    overridden = start.check_same_run(asdict(recipe), record["recipe"], run.path, request.overrides)
    overridden |= start.check_same_data(store, record, newest, request.overrides)
    is_last = record["step"] >= recipe.training.max_steps
    if is_last and request.resume_from is None and checkpoint.find_problem(run.final) is None:
        return Opened(newest, complete=True)
    announce(f"resuming {newest}")
    for name, (was, now) in overridden.items():
        announce(f"--override {name}: was {was}, is {now}; recorded")
    return Opened(newest, overridden=overridden)


def find_start(recipe: Recipe, store: TokenStore, resumed: Path | None, *, verify: bool = True) -> Start:
    """The model on the meta device, and where its weights are to be had.

    Args:
        verify: False where the files are compared with their manifests elsewhere.
    """
    if resumed is None:
        return start.from_recipe(recipe, store, verify=verify)
    return start.from_checkpoint(recipe, resumed, checkpoint.read_record(resumed), store, verify=verify)


def find_start_together(
    recipe: Recipe, store: TokenStore, resumed: Path | None, processes: Processes, alive: Callable[[], None]
) -> Start:
    """`find_start` on all ranks, which share the work of verifying files.

    Raises:
        ValueError: the weights cannot be loaded, contradict the recipe, or are damaged.
    """
    begin = processes.together(lambda: find_start(recipe, store, resumed, verify=False))
    for directory in loading.directories(begin.source):
        if directory == resumed or not (directory / checkpoint.MANIFEST).is_file():
            continue  # what is resumed has been verified
        problem = _find_problem(directory, processes, alive, loading.is_loaded)
        processes.on_main(partial(loading.refuse_damage, directory, problem))
    return begin


@contextmanager
def holding(begin: Start, resumed: Path | None) -> Iterator[None]:
    """While it lasts, nobody rotates away what weights and state are read from."""
    with ExitStack() as stack:
        for directory in {*loading.directories(begin.source), *([resumed] if resumed is not None else [])}:
            stack.enter_context(checkpoint.reading(directory))
        yield


def check_base(begin: Start, resumed: Path | None) -> None:
    """Refuses to go on with an adapter over other frozen weights than those it was trained over."""
    if resumed is None or begin.adapter is None:
        return
    begin.digest_base()
    if begin.base_digest != checkpoint.read_record(resumed)["base_digest"]:
        raise ValueError(
            f"{begin.base[0]}: these are not the weights that the adapter in {resumed} was trained over; "
            "put the base back to resume, or choose another training.output_dir"
        )


def check_disk(recipe: Recipe, begin: Start) -> None:
    """Refuses a disk on which not even one checkpoint fits; warns of one that will be full (see `check_space`)."""
    warning = check_space(begin, recipe)
    if warning:
        announce(warning)


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


def write_preamble(recipe: Recipe, run: RunDirectory, begin: Start, opened: Opened) -> None:
    """Writes what stands in a run before its first step, and sets aside what will be done again."""
    announce(begin.describe())
    announce(f"attention: {begin.attention} (training.attention: {recipe.training.attention})")
    resumed = opened.resumed
    step = 0 if resumed is None else checkpoint.read_record(resumed)["step"]
    for later in checkpoint.steps_present(run.checkpoints):
        if resumed is not None and later.name > resumed.name and checkpoint.find_problem(later) is None:
            announce(f"{later.name} is set aside as {checkpoint.move_aside(later, 'superseded').name}")
    aside = run.set_aside(step if resumed else -1)
    if aside:
        announce(f"log lines past step {step} are set aside in {aside}")
    temporary = run.path / f"{checkpoint.TEMPORARY}recipe.yaml"
    dump_recipe(recipe, temporary)
    temporary.replace(run.path / "recipe.yaml")  # first: from here on the directory is known to be a run
    name = "environment.json" if resumed is None else f"environment-{checkpoint.step_name(step)}.json"
    checkpoint.write_text(run.path / name, json.dumps({**environment(), "attention": begin.attention}, indent=2) + "\n")
    for field_name, (was, now) in opened.overridden.items():
        run.append({"step": step, "kind": "override", "field": field_name, "was": was, "is": now})
    if resumed is None:
        shutil.rmtree(run.path / start.BASE, ignore_errors=True)  # of a start that was cut short
        begin.write_merged_base()
        begin.digest_base()
