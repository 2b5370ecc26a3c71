"""The training loop, to be read from top to bottom: `train` opens the run, `Trainer.train` takes the steps.

Order within a step: micro-batches forward and backward; loss, norm and signals agreed by all ranks; update; average;
log; held-out loss; samples; checkpoint. So whatever a checkpoint holds is in the log already. Only a signal puts the
checkpoint first: the measurements that are due then are made when the run goes on.

Points of the probe: "trial forward", "trial backward", "start", "batch", "forward", "backward" (subject: the
micro-batch), "agree", "update", "updated", "evaluate", "sample", "save", and those of `checkpoints.saving`.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from retrofit.checkpoints import checkpoint
from retrofit.data.store import TokenStore
from retrofit.data.stream import StepBatches, StepStream
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.attention import padding
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.objective.objectives import FlexMDMObjective, MDMObjective, MicroBatch, Objective
from retrofit.objective.times import UNIFORM, importance_density
from retrofit.probe import Probe, no_probe
from retrofit.recipe import Recipe

from .budget import Budget, choose_budget, try_budget
from .engines import make_engine
from .engines.base import Engine
from .feeding import feed, naming_the_lost
from .guard import (
    EXIT_HANGING,
    NotFinite,
    Preempted,
    SignalGuard,
    announce,
    describe_divergence,
)
from .keeper import Keeper, NotFiniteError
from .log import Progress, Tracker, describe_loss, open_trackers
from .memory import is_out_of_memory
from .opening import (
    Request,
    check_base,
    check_disk,
    check_recipe,
    find_start_together,
    holding,
    open_extras,
    open_run,
    take_directory,
    write_preamble,
)
from .optimizer import build_optimizer, build_scheduler, decayed_names, restore_scheduler
from .outcome import Outcome
from .processes import Processes
from .random_state import random_states, restore_random_states
from .run_directory import SAMPLES, RunDirectory
from .samples import draw_samples
from .start import Start
from .throughput import Sums, UsefulFlops, Work, peak_flops, peak_memory
from .watch import Watch, launch_store

HELD_OUT_SEED = 20_250_903
"""Seed of the held-out documents' t and noise, not the recipe's: runs of different seeds can be compared."""


def train(
    recipe: Recipe,
    request: Request | None = None,
    *,
    outcome: Outcome | None = None,
    guard: SignalGuard | None = None,
    probe: Probe = no_probe,
) -> None:
    """Trains by a recipe, in this process or as one rank of a launched job; goes on where the run directory left off.

    Args:
        request: from where to go on, if not from the newest good checkpoint.
        probe: called at the points that the module names.

    Raises:
        ValueError: the recipe, the data, the starting weights or the run directory do not fit together.
        SystemExit: with the codes that `guard` documents.
    """
    section = recipe.training
    request = request or Request()
    patience = 60 * max(section.step_timeout_minutes, section.start_timeout_minutes)
    # A collective that gives up before the watch does would hide which rank hangs.
    processes = Processes(bf16=section.bf16, time_out=60 + 2 * patience)
    run = RunDirectory(Path(section.output_dir))
    with ExitStack() as stack:
        stack.callback(processes.close)
        stack.callback(run.release)
        outcome = outcome or stack.enter_context(Outcome(processes.rank))
        guard = guard or stack.enter_context(SignalGuard())
        guard.stop_after(section.stop_after_minutes)
        processes.together(lambda: check_recipe(recipe, processes, run))
        deepspeed = processes.together(lambda: processes.deepspeed_config(recipe))
        take_directory(run, processes, fresh=request.fresh)
        name = processes.on_main(lambda: str(time.time()))

        def say_that_it_hangs(text: str, step: int) -> None:
            announce(text)
            outcome.write(EXIT_HANGING, text, step)

        stack.enter_context(naming_the_lost(outcome))
        watch = stack.enter_context(
            Watch(
                launch_store(name, processes.world_size),
                processes.rank,
                processes.world_size,
                directory=run.path,
                step_seconds=60 * section.step_timeout_minutes,
                start_seconds=60 * section.start_timeout_minutes,
                say=say_that_it_hangs,
            )
        )
        opened = open_run(recipe, run, processes, request, watch.alive)
        outcome.belongs_to(run.path)
        if opened.complete:
            if processes.is_main:
                announce(f"{run.path} is complete at step {section.max_steps}; its weights are in {run.final}")
            return
        watch.newest = opened.resumed
        store = processes.together(lambda: TokenStore.open(recipe.data.path, "train"))
        begin = find_start_together(recipe, store, opened.resumed, processes, watch.alive)
        held_out, tokenizer = processes.together(lambda: open_extras(recipe, begin))
        if opened.resumed is None:
            begin.parent = processes.on_main(begin.name_parent)
        processes.together(lambda: begin.choose_attention(recipe, processes.device))
        processes.on_main(lambda: check_disk(recipe, begin))
        processes.on_main(lambda: check_base(begin, opened.resumed))
        record = checkpoint.read_record(opened.resumed) if opened.resumed is not None else None
        objective = build_objective(recipe, begin.model.config, section.seed)
        budget = choose_budget(recipe, begin, objective, store, processes, deepspeed, record)
        engine = make_engine(processes, bf16=section.bf16, average=section.ema_decay is not None, deepspeed=deepspeed)
        with holding(begin, opened.resumed):
            trainer = Trainer(
                recipe, processes, engine, guard, outcome, watch, probe, run, begin, store, held_out, tokenizer, budget
            )
            if (resumed := opened.resumed) is not None:
                processes.together(lambda: trainer.resume(resumed))
        processes.on_main(lambda: write_preamble(recipe, run, begin, opened))
        if deepspeed is not None:
            text = json.dumps(deepspeed, indent=2) + "\n"
            processes.on_main(lambda: checkpoint.write_text(run.path / "deepspeed.json", text))
        begin.merged_base = None  # written by now; ranks other than 0 let go of it too
        trainer.train()


class Trainer:
    """A run in progress on this rank.

    Attributes:
        step: steps completed. tokens: tokens of x_t computed so far, over all ranks; slots do not count.
    """

    def __init__(
        self,
        recipe: Recipe,
        processes: Processes,
        engine: Engine,
        guard: SignalGuard,
        outcome: Outcome,
        watch: Watch,
        probe: Probe,
        run: RunDirectory,
        begin: Start,
        store: TokenStore,
        held_out: TokenStore | None,
        tokenizer: PreTrainedTokenizerBase | None,
        budget: Budget,
    ) -> None:
        self.recipe, self.processes, self.engine, self.run, self.begin = recipe, processes, engine, run, begin
        self.guard, self.outcome, self.watch, self.probe = guard, outcome, watch, probe
        self.step = 0
        self.tokens = 0
        self.pending: list[str] = []
        self.since_log = Sums()
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        section = recipe.training
        self.store, self.tokenizer, self.budget = store, tokenizer, budget
        self.objective = build_objective(recipe, begin.model.config, section.seed)
        self.useful_flops = UsefulFlops(begin.model.config, begin.weights.shapes, begin.trainable)
        decayed = decayed_names(begin.model)
        processes.together(
            lambda: engine.prepare(
                begin.model, self._read, lambda parameters: build_optimizer(parameters, decayed, recipe.optimizer)
            )
        )
        self.scheduler = build_scheduler(engine.optimizer, recipe.optimizer, section.max_steps)
        self.keeper = Keeper(
            processes,
            engine,
            run,
            begin,
            rotate=self._rotate if section.save_total_limit is not None else None,
            say=self._say,
            alive=watch.alive,
            probe=probe,
            time_out=60 * section.step_timeout_minutes,
        )
        self.stream = self._stream(
            store,
            self.objective,
            seed=section.seed,
            documents_per_step=section.documents_per_step,
            time_strata=recipe.objective.time_strata or section.documents_per_step,
            max_steps=section.max_steps,
        )
        engine.warm_up(self._empty_loss)
        self.budget = try_budget(self.budget, engine, self.objective, begin.model.config, self._at)
        self.stream.max_tokens_per_device = self.budget.rows
        self.held_out = self._held_out(held_out) if held_out is not None else []
        self._seed_dropout()

    def _read(self, name: str) -> Tensor:
        self.watch.alive()
        return self.begin.read(name)

    def _rotate(self, newest: Path) -> None:
        """Deletes old checkpoints; called from the thread that saved the newest."""
        section = self.recipe.training
        assert section.save_total_limit is not None
        checkpoint.rotate(
            self.run.checkpoints,
            section.save_total_limit,
            newest,
            section.save_every_keep,
            before=lambda directory: self.probe("rotate", self.step, directory),
        )

    def _at(self, where: str, subject: Any = None) -> None:
        """A point of the step under way, which all ranks pass in the same order."""
        self.watch.beat(self.step + 1, where)
        self.probe(where, self.step + 1, subject)

    def _seed_dropout(self) -> None:
        """Dropout is the only draw from torch's generators in a step; each rank has its own."""
        key = keyed_uniform(self.recipe.training.seed, self.step, self.processes.rank)
        torch.manual_seed(int(key * 2**52))

    def _stream(self, store: TokenStore, objective: Objective, **draws: int) -> StepStream:
        """This rank's part of a stream of `draws`, cut up as the recipe says."""
        return StepStream(
            store,
            objective,
            max_tokens_per_device=self.budget.rows,
            micro_batches=self.recipe.training.gradient_accumulation_steps or 1,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            **draws,
        )

    def _empty_loss(self) -> Tensor:
        """The loss of a micro-batch without documents: 0, by way of every trainable weight."""
        nothing = self.stream.examples(self.stream.ordinals(0)[:0]).micro_batch([]).to(self.engine.device)
        return torch.stack(
            [term.sum() for term in self.objective.loss_terms(self.engine.model, nothing).values()]
        ).sum()

    def _held_out(self, store: TokenStore) -> list[MicroBatch]:
        """The held-out documents with their fixed noise, cut up as one step of a stream of their own.

        Their t is uniform whatever `objective.time_sampling` says, so that runs can be compared.
        """
        count = self.held_out_documents = min(self.recipe.training.eval_documents, len(store))
        objective = build_objective(self.recipe, self.begin.model.config, HELD_OUT_SEED, uniform_time=True)
        stream = self._stream(
            store, objective, seed=HELD_OUT_SEED, documents_per_step=count, time_strata=count, max_steps=1
        )
        return stream[0].micro_batches

    # ---- the loop

    def train(self) -> None:
        """Takes the remaining steps and writes final/."""
        section = self.recipe.training
        self._at("start")
        if self.processes.is_main:
            self.progress = Progress(self.step, section.max_steps)
            self.trackers = open_trackers(section.report_to, self.run.path, asdict(self.recipe))
            if self.budget.estimate is not None:
                self._say(self.budget.describe())
                self.run.append({"step": self.step, "kind": "budget", **self.budget.record()})
        if self.processes.any(self.guard.received is not None):
            self._stop("before the first step of this start; nothing is lost")
        if self.step == 0 and self.held_out:
            self.pending = ["held_out"]
        self._measure()
        self.engine.model.train()
        with closing(self._feed()) as batches:
            for step, batch in batches:
                while self.step < step:
                    if self._skip_step():
                        self._save_and_stop()
                try:
                    stop = self.take_step(batch)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise self._out_of_memory(batch) from error
                    raise
                self.watch.started()
                stop = self._after_step(stop)
                if stop:
                    self._save_and_stop()
        while self.step < section.max_steps:
            if self._skip_step():
                self._save_and_stop()
        self.finish()

    def _out_of_memory(self, batch: StepBatches) -> ValueError:
        rows = max(micro_batch.num_tokens for micro_batch in batch.micro_batches)
        return ValueError(
            f"step {self.step + 1}: rank {self.processes.rank} is out of memory; its micro-batches have up to {rows} "
            f"rows: give less than that as training.max_tokens_per_device (now {self.budget.rows}) or set "
            "training.gradient_checkpointing: true, and start again"
        )

    def _feed(self) -> Generator[tuple[int, StepBatches], None, None]:
        """(step, counted from 0, this rank's part of it) of the steps that are left, without those to be skipped."""
        section = self.recipe.training
        steps = [step for step in range(self.step, section.max_steps) if step + 1 not in section.skip_steps]
        pin = self.engine.device.type == "cuda"
        with closing(feed(self.stream, steps, workers=self.recipe.data.num_workers, pin=pin)) as batches:
            for step in steps:
                began = time.monotonic()
                batch = next(batches)
                self.since_log.waiting += time.monotonic() - began
                yield step, batch

    def _after_step(self, stop: bool) -> bool:
        """Logs, measures and saves what is due after a step; returns whether to stop, agreed by all ranks."""
        section = self.recipe.training
        if self.since_log.steps and self._is_due(section.logging_steps):
            self.log_step()
        self.pending = [
            kind
            for kind, due in (
                ("held_out", bool(self.held_out) and self._is_due(section.eval_steps)),
                ("sample", self.tokenizer is not None and self._is_due(section.sample_steps)),
            )
            if due
        ]
        if self.pending and not stop:
            self._measure()
            stop = self.processes.any(self.guard.received is not None)
        if not stop and self._is_due(section.save_steps):
            self.save()
        return stop

    def _measure(self) -> None:
        """Makes the measurements that are due."""
        for kind in self.pending:
            self.evaluate() if kind == "held_out" else self.sample()
        self.pending = []

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.recipe.training.max_steps)

    def _save_and_stop(self) -> None:
        """Saves the step at which all ranks agreed to stop, and leaves when that is done."""
        self.save()
        saved = self.keeper.settle()
        self._stop("; the same command goes on from " + ("there" if saved else "the last checkpoint that was saved"))

    def _stop(self, how: str) -> None:
        self.outcome.reason = f"stopped by {self.guard.received or 'a signal to another rank'}"
        self._say(f"{self.outcome.reason} at step {self.step}{'' if how.startswith(';') else ' '}{how}")
        self._close()
        raise Preempted

    def _skip_step(self) -> bool:
        """Passes over a step that the recipe names: its documents count as seen, and nothing is updated.

        Returns whether to stop after it, agreed by all ranks.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a schedule that moves on without an update is meant here
            self.scheduler.step()
        self.step += 1
        self.outcome.step = self.step
        self._say(f"step {self.step} is skipped (training.skip_steps)")
        if self.processes.is_main:
            draws = self.stream.ordinals(self.step - 1).tolist()
            self.run.append({"step": self.step, "kind": "skipped", "draws": [draws[0], draws[-1]]})
        return self._after_step(stop=self.processes.any(self.guard.received is not None))

    def take_step(self, step: StepBatches) -> bool:
        """One optimizer step over this rank's part of it; returns whether the ranks agreed to stop after it.

        The loss is the sum over documents and positions, divided by documents_per_step times the window.

        Raises:
            NotFinite: before the update, on all ranks, if any loss or gradient is not finite.
        """
        engine, began, batches = self.engine, time.monotonic(), step.micro_batches
        scale = self.recipe.training.documents_per_step * self.recipe.objective.window
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        work, padded, compiled = Work(), 0, self.recipe.training.compile
        for i, batch in enumerate(batches):
            work += Work.of(batch)
            padded += padding(batch.packed, self.begin.attention, uniform=compiled)
            batch = batch.to(engine.device)
            with engine.micro_batch(last=i == len(batches) - 1):
                self._at("forward", batch)
                terms = self.objective.loss_terms(engine.model, batch)
                self._at("backward", batch)
                engine.backward(torch.stack([term.sum() for term in terms.values()]).sum() / scale)
            seen.append((batch.ordinals, {name: term.detach() for name, term in terms.items()}))
        self._at("agree")
        norm = engine.gradient_norm()

        # Nothing of a step is read from the device before here, and all that ranks tell each other is one message.
        names = list(seen[0][1])
        sums = torch.stack([torch.cat([terms[name] for _, terms in seen]).double().sum() for name in names])
        signalled, infinite = self.guard.received is not None, not (math.isfinite(norm) and norm >= 0)
        part_failed = self.keeper.poll()
        self.watch.newest = self.keeper.newest
        told = [signalled, infinite, part_failed, work.masks, work.squares, padded]
        message = torch.cat([sums, torch.tensor(told, dtype=torch.float64, device=sums.device)])
        *totals, stop, bad_norm, failed, masks, squares, all_padded = self.processes.total(message)
        losses = {name: total / scale for name, total in zip(names, totals, strict=True)}
        if bad_norm or not all(map(math.isfinite, losses.values())):
            engine.discard()
            self._stop_on_divergence(losses, norm, seen)
        if failed:
            self.keeper.settle()  # says what became of the save under way

        rate = engine.optimizer.param_groups[0]["lr"]
        self._at("update")
        engine.step(norm, self.recipe.optimizer.max_grad_norm)
        self.scheduler.step()
        if self.recipe.training.ema_decay is not None:
            engine.update_average(self.recipe.training.ema_decay)
        self.step += 1
        self.outcome.step = self.step
        self._count(step.rows, int(masks), int(squares), time.monotonic() - began)
        self.since_log.add_losses(losses)
        self.since_log.padding += int(all_padded)
        self.since_log.last = {"gradient_norm": norm, "learning_rate": rate}
        self.probe("updated", self.step)
        return bool(stop)

    def _count(self, rows: list[list[int]], masks: int, squares: int, seconds: float) -> None:
        """Adds what a step computed and how long it took to the sums since the last line of the log."""
        documents, total = self.recipe.training.documents_per_step, sum(map(sum, rows))
        slots = documents if self.recipe.objective.name == "flexmdm" else 0
        self.tokens += total - slots
        sums = self.since_log
        sums.steps += 1
        sums.documents += documents
        sums.seconds += seconds
        sums.rows += total
        sums.slots += slots
        sums.balanced += sum(max(ranks) * len(ranks) for ranks in rows)
        sums.flops += self.useful_flops(Work(total, masks, documents, squares))

    def _stop_on_divergence(
        self, losses: dict[str, float], norm: float, seen: list[tuple[Tensor, dict[str, Tensor]]]
    ) -> None:
        """Names step, draws and the last good checkpoint, and ends the run on all ranks."""
        self.keeper.settle()
        loss = sum(losses.values())
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        per_draw = [(ordinals, torch.stack(list(terms.values())).sum(0)) for ordinals, terms in seen]
        bad = [int(draw) for ordinals, loss in per_draw for draw in ordinals[~loss.isfinite()]]
        offending = sorted(draw for draws in self.processes.gather(bad[:8]) for draw in draws)
        draws = self.stream.ordinals(self.step).tolist()
        text = describe_divergence(
            step=self.step + 1,
            what=what,
            value=value,
            ordinals=draws,
            offending=offending,
            last_good=str(self.keeper.newest) if self.keeper.newest else None,
        )
        if self.processes.is_main:
            self.run.append({"step": self.step + 1, "kind": "stopped", "reason": text, **losses, "gradient_norm": norm})
        self.outcome.reason = text
        self._say(text)
        self._close()
        raise NotFinite

    # ---- what is reported

    def log_step(self) -> None:
        """The means since the last line of the log, to the log, the trackers and the terminal."""
        sums, self.since_log = self.since_log, Sums()
        losses = {name: value / sums.steps for name, value in sums.losses.items()}
        device, world_size = self.engine.device, self.processes.world_size
        waiting, memory = self.processes.most([sums.waiting, peak_memory(device)])
        self._record(
            {
                "step": self.step,
                "kind": "train",
                "loss": sum(losses.values()),
                **losses,
                **sums.last,
                "documents": self.step * self.recipe.training.documents_per_step,
                "tokens": self.tokens,
                **sums.describe(world_size=world_size, peak=peak_flops(device)),
                "seconds_waiting": waiting,
                "seconds_saving": self.keeper.take_stall(),
                "peak_memory_gb": memory / 1e9,
            }
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss by term, with the weights that a checkpoint has (averaged, if averaging is on)."""
        engine = self.engine
        sums: dict[str, float] = {}
        engine.model.eval()
        with engine.averaged(), engine.autocast():
            for batch in self.held_out:
                self._at("evaluate", batch)
                terms = self.objective.loss_terms(engine.model, batch.to(engine.device))
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term.double().sum())
        engine.model.train()
        scale = self.held_out_documents * self.recipe.objective.window
        losses = {
            name: total / scale for name, total in zip(sums, self.processes.total(list(sums.values())), strict=True)
        }
        self._record(
            {
                "step": self.step,
                "kind": "held_out",
                "loss": sum(losses.values()),
                **losses,
                "documents": self.held_out_documents,
            }
        )

    def sample(self) -> None:
        """Samples into samples.jsonl. All ranks draw the same ones: a sharded model needs every rank in a forward."""
        assert self.tokenizer is not None
        self._at("sample")
        with self.engine.averaged(), self.engine.autocast():
            samples = draw_samples(self.engine.module, self.tokenizer, self.recipe)
        if self.processes.is_main:
            assert self.progress is not None
            for sample in samples:
                self.run.append({"step": self.step, **sample}, SAMPLES)
            self.progress.note("sample", self.step, repr(samples[0]["text"][:200]))

    def _record(self, record: dict[str, Any]) -> None:
        if not self.processes.is_main:
            return
        self.run.append(record)
        numbers = {f"{record['kind']}/{name}": value for name, value in record.items() if isinstance(value, float)}
        for tracker in self.trackers:
            tracker.log(numbers, self.step)
        assert self.progress is not None
        if record["kind"] == "train":
            self.progress.show(record)
        else:
            self.progress.note("held out", self.step, describe_loss(record))

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.say(f"retrofit: {text}")
        elif self.processes.is_main:
            announce(text)

    # ---- what is kept

    def save(self) -> None:
        """Starts to write a checkpoint, to which rotation is tied. A failure is said, and the run goes on.

        Raises:
            NotFinite: a weight is not finite; nothing is written.
        """
        self._at("save")
        rng = random_states(self.processes) if self._has_dropout() else {}
        try:
            self.keeper.save(self.step, self._record_of_state(), rng)
        except NotFiniteError as error:
            newest = self.keeper.newest
            self.outcome.reason = f"step {self.step}: {error}; not saved; last good checkpoint: {newest or 'none'}"
            self._say(f"{self.outcome.reason}; lower optimizer.learning_rate")
            self._close()
            raise NotFinite from None

    def _has_dropout(self) -> bool:
        return self.begin.adapter is not None and self.begin.adapter.lora_dropout > 0

    def _record_of_state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "scheduler": self.scheduler.state_dict(),
            "ordinals_consumed": self.step * self.recipe.training.documents_per_step,
            "tokens": self.tokens,
            "since_log": asdict(self.since_log),
            "pending": self.pending,
            "engine": self.engine.name,
            "max_tokens_per_device": self.budget.rows,
            "data_digest": self.store.manifest.digest,
            "parent": self.begin.parent,
            "base_digest": self.begin.base_digest,
            "recipe": asdict(self.recipe),
        }

    def resume(self, directory: Path) -> None:
        """Puts weights, optimizer, schedule, average, generators and running means back as they were."""
        tensors, record, rng = checkpoint.open_state(directory)
        self.keeper.restore(tensors, record["adam_step"])
        restore_scheduler(self.scheduler, record["scheduler"])
        self.step, self.tokens, self.pending = record["step"], record["tokens"], record["pending"]
        self.outcome.step = self.step
        self.keeper.newest = directory
        if self._has_dropout() and not restore_random_states(self.processes, rng):
            self._seed_dropout()
            if self.processes.is_main:
                announce("dropout's random state is that of another number of processes; dropout is drawn anew")
        self.since_log = Sums(**record["since_log"])

    def finish(self) -> None:
        """Writes final/: the loadable weights of the last step, without training state."""
        self.keeper.save_final(self.step)
        self._say(f"complete at step {self.step}; weights in {self.run.final}")
        self._close()

    def _close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.progress is not None:
            self.progress.close()


def build_objective(recipe: Recipe, config: LLaDAConfig, seed: int, *, uniform_time: bool = False) -> Objective:
    """The recipe's objective for a model's configuration, or with uniform t, for losses that are to be compared."""
    if recipe.objective.name == "mdm":
        return MDMObjective(config, seed, recipe.objective.window)
    assert isinstance(config, FlexMDMConfig)
    uniform = uniform_time or recipe.objective.time_sampling == "uniform"
    return FlexMDMObjective(config, seed, UNIFORM if uniform else importance_density(config.schedules))
