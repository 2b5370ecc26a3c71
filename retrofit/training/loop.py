"""The training loop, to be read from top to bottom: `train` opens the run, `Trainer.train` takes the steps.

Order within a step: micro-batches forward and backward; loss, norm and signals agreed by all ranks; update; average;
log; held-out loss; samples; checkpoint. So whatever a checkpoint holds is in the log already.
"""

from __future__ import annotations

import math
import time
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from retrofit.checkpoints import checkpoint
from retrofit.data.store import TokenStore
from retrofit.data.stream import StepStream
from retrofit.flexmdm import FlexMDMConfig, LLaDAConfig
from retrofit.flexmdm.noise import keyed_uniform
from retrofit.objective.objectives import FlexMDMObjective, MDMObjective, MicroBatch, Objective
from retrofit.recipe import Recipe

from .ema import Average
from .engine import Engine
from .guard import NotFinite, Preempted, SignalGuard, announce, describe_divergence, ignore_signals
from .log import Progress, Tracker, describe_loss, open_trackers
from .opening import COMPLETE, check_base, check_recipe, load_start, open_extras, open_run, write_preamble
from .optimizer import build_optimizer, build_scheduler, restore_scheduler
from .outcome import Outcome
from .run_directory import SAMPLES, RunDirectory
from .samples import draw_samples
from .start import Start

HELD_OUT_SEED = 20_250_903
"""Seed of the held-out documents' t and noise, not the recipe's: runs of different seeds can be compared."""


def train(recipe: Recipe, *, outcome: Outcome | None = None, guard: SignalGuard | None = None) -> None:
    """Trains by a recipe, in this process or as one rank of a launched job; goes on where the run directory left off.

    Raises:
        ValueError: the recipe, the data, the starting weights or the run directory do not fit together.
        SystemExit: with the codes that `guard` documents.
    """
    engine = Engine(bf16=recipe.training.bf16)
    run = RunDirectory(Path(recipe.training.output_dir))
    with ExitStack() as stack:
        stack.callback(engine.close)
        stack.callback(run.release)
        outcome = outcome or stack.enter_context(Outcome(engine.rank))
        guard = guard or stack.enter_context(SignalGuard())
        guard.stop_after(recipe.training.stop_after_minutes)
        engine.together(lambda: check_recipe(recipe, engine, run))
        resumed = engine.on_main(lambda: open_run(recipe, run))
        outcome.belongs_to(run.path)
        if resumed == COMPLETE:
            if engine.is_main:
                announce(f"{run.path} is complete at step {recipe.training.max_steps}; its weights are in {run.final}")
            return
        store = engine.together(lambda: TokenStore.open(recipe.data.path, "train"))
        begin = engine.together(lambda: load_start(recipe, store, resumed))
        engine.together(begin.load_all)
        held_out, tokenizer = engine.together(lambda: open_extras(recipe, begin))
        if resumed is None:
            begin.parent = engine.on_main(begin.name_parent)
        engine.on_main(lambda: check_base(begin, resumed))
        trainer = Trainer(recipe, engine, guard, outcome, run, begin, store, held_out, tokenizer)
        if resumed is not None:
            engine.together(lambda: trainer.resume(Path(resumed)))
        engine.on_main(lambda: write_preamble(recipe, run, begin, resumed))
        begin.merged_base = None  # written by now; ranks other than 0 let go of it too
        trainer.train()


class Trainer:
    """A run in progress on this rank.

    Attributes:
        step: steps completed. tokens: packed rows computed so far, over all ranks.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        guard: SignalGuard,
        outcome: Outcome,
        run: RunDirectory,
        begin: Start,
        store: TokenStore,
        held_out: TokenStore | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        self.recipe, self.engine, self.guard, self.run, self.begin = recipe, engine, guard, run, begin
        self.outcome = outcome
        section = recipe.training
        engine.prepare(begin.model, lambda parameters: build_optimizer(parameters, recipe.optimizer))
        self.scheduler = build_scheduler(engine.optimizer, recipe.optimizer, section.max_steps)
        self.average = Average(engine.parameters, section.ema_decay) if section.ema_decay is not None else None
        self.store = store
        self.objective = build_objective(recipe, begin.model.config, section.seed)
        self.stream = self._stream(
            store,
            self.objective,
            seed=section.seed,
            documents_per_step=section.documents_per_step,
            time_strata=recipe.objective.time_strata or section.documents_per_step,
            max_steps=section.max_steps,
        )
        self.held_out = self._held_out(held_out) if held_out is not None else []
        self.tokenizer = tokenizer
        engine.warm_up(self._empty_loss)
        self.step = 0
        self.tokens = 0
        self.since_log = _Sums()
        self.progress: Progress | None = None
        self.trackers: list[Tracker] = []
        self._seed_dropout()

    def _seed_dropout(self) -> None:
        """Dropout is the only draw from torch's generators in a step; each rank has its own."""
        key = keyed_uniform(self.recipe.training.seed, self.step, self.engine.rank)
        torch.manual_seed(int(key * 2**52))

    def _stream(self, store: TokenStore, objective: Objective, **draws: int) -> StepStream:
        """This rank's part of a stream of `draws`, cut up as the recipe says."""
        return StepStream(
            store,
            objective,
            max_tokens_per_device=self.recipe.training.max_tokens_per_device,
            micro_batches=self.recipe.training.gradient_accumulation_steps or 1,
            rank=self.engine.rank,
            world_size=self.engine.world_size,
            **draws,
        )

    def _empty_loss(self) -> Tensor:
        """The loss of a micro-batch without documents: 0, by way of every trainable weight."""
        nothing = self.stream.examples(self.stream.ordinals(0)).micro_batch([]).to(self.engine.device)
        return torch.stack(
            [term.sum() for term in self.objective.loss_terms(self.engine.model, nothing).values()]
        ).sum()

    def _held_out(self, store: TokenStore) -> list[MicroBatch]:
        """The held-out documents with their fixed noise, cut up as one step of a stream of their own."""
        count = self.held_out_documents = min(self.recipe.training.eval_documents, len(store))
        objective = build_objective(self.recipe, self.begin.model.config, HELD_OUT_SEED)
        stream = self._stream(
            store, objective, seed=HELD_OUT_SEED, documents_per_step=count, time_strata=count, max_steps=1
        )
        return stream[0]

    # ---- the loop

    def train(self) -> None:
        """Takes the remaining steps and writes final/."""
        section, engine = self.recipe.training, self.engine
        if engine.is_main:
            self.progress = Progress(self.step, section.max_steps)
            self.trackers = open_trackers(section.report_to, self.run.path, asdict(self.recipe))
        if self.step == 0 and self.held_out:
            self.evaluate()
        engine.model.train()
        for batches in self._batches():
            stop = self.take_step(batches)
            is_last = self.step == section.max_steps
            if is_last or self.step % section.logging_steps == 0:
                self.log_step()
            if self.held_out and self._is_due(section.eval_steps):
                self.evaluate()
            if self.tokenizer is not None and self._is_due(section.sample_steps):
                self.sample()
            saved = self.save() if stop or self._is_due(section.save_steps) else False
            if stop and not is_last:
                where = "there" if saved else "the last checkpoint that was saved"
                self.outcome.reason = f"stopped by {self.guard.received or 'a signal to another rank'}"
                self._say(f"{self.outcome.reason} at step {self.step}; the same command goes on from {where}")
                self._close()
                raise Preempted
        self.finish()

    def _is_due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.recipe.training.max_steps)

    def _batches(self) -> DataLoader[list[MicroBatch]]:
        return DataLoader(
            self.stream,
            batch_size=None,
            sampler=range(self.step, self.recipe.training.max_steps),
            num_workers=self.recipe.data.num_workers,
            collate_fn=_identity,
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # or the loader would draw its seed from dropout's generator
        )

    def take_step(self, batches: list[MicroBatch]) -> bool:
        """One optimizer step over this rank's micro-batches; returns whether the ranks agreed to stop after it.

        The loss is the sum over documents and positions, divided by documents_per_step times the window.

        Raises:
            NotFinite: before the update, on all ranks, if any loss or gradient is not finite.
        """
        engine, began = self.engine, time.monotonic()
        scale = self.recipe.training.documents_per_step * self.recipe.objective.window
        seen: list[tuple[Tensor, dict[str, Tensor]]] = []
        for i, batch in enumerate(batches):
            batch = batch.to(engine.device)
            with engine.micro_batch(last=i == len(batches) - 1):
                terms = self.objective.loss_terms(engine.model, batch)
                engine.backward(torch.stack([term.sum() for term in terms.values()]).sum() / scale)
            seen.append((batch.ordinals, {name: term.detach() for name, term in terms.items()}))
        norm = engine.gradient_norm()

        names = list(seen[0][1])
        sums = torch.stack([torch.cat([terms[name] for _, terms in seen]).double().sum() for name in names]).tolist()
        rows = sum(batch.num_tokens for batch in batches)
        signalled, infinite = self.guard.received is not None, not math.isfinite(norm)
        *totals, all_rows, stop, bad_norm = engine.total([*sums, rows, signalled, infinite])
        losses = {name: total / scale for name, total in zip(names, totals, strict=True)}
        if bad_norm or not all(map(math.isfinite, losses.values())):
            engine.discard()
            self._stop_on_divergence(losses, norm, seen)

        rate = engine.optimizer.param_groups[0]["lr"]
        engine.step(norm, self.recipe.optimizer.max_grad_norm)
        self.scheduler.step()
        if self.average is not None:
            self.average.update()
        self.step += 1
        self.outcome.step = self.step
        self.tokens += int(all_rows)
        self.since_log.add(losses, int(all_rows), time.monotonic() - began)
        self.since_log.last = {"gradient_norm": norm, "learning_rate": rate}
        return bool(stop)

    def _stop_on_divergence(
        self, losses: dict[str, float], norm: float, seen: list[tuple[Tensor, dict[str, Tensor]]]
    ) -> None:
        """Names step, draws and the last good checkpoint, and ends the run on all ranks."""
        loss = sum(losses.values())
        what, value = ("gradient norm", norm) if math.isfinite(loss) else ("loss", loss)
        first = torch.full((8,), -1)
        per_draw = [(ordinals, torch.stack(list(terms.values())).sum(0)) for ordinals, terms in seen]
        bad = torch.cat([ordinals[~loss.isfinite()].cpu() for ordinals, loss in per_draw])
        first[: len(bad[:8])] = bad[:8]
        offending = sorted(int(draw) for draws in self.engine.gather(first) for draw in draws if draw >= 0)
        draws = self.stream.ordinals(self.step).tolist()
        if self.engine.is_main:
            newest, _ = checkpoint.latest(self.run.checkpoints)
            text = describe_divergence(
                step=self.step + 1,
                what=what,
                value=value,
                ordinals=draws,
                offending=offending,
                last_good=str(newest) if newest else None,
            )
            self.run.append({"step": self.step + 1, "kind": "stopped", "reason": text, **losses, "gradient_norm": norm})
        else:
            text = ""
        self.outcome.reason = text
        self._say(text)
        self._close()
        raise NotFinite

    # ---- what is reported

    def log_step(self) -> None:
        """The means since the last line of the log, to the log, the trackers and the terminal."""
        sums, self.since_log = self.since_log, _Sums()
        losses = {name: value / sums.steps for name, value in sums.losses.items()}
        self._record(
            {
                "step": self.step,
                "kind": "train",
                "loss": sum(losses.values()),
                **losses,
                **sums.last,
                "documents": self.step * self.recipe.training.documents_per_step,
                "tokens": self.tokens,
                "tokens_per_second": sums.tokens / max(sums.seconds, 1e-9),
                "seconds_per_step": sums.seconds / sums.steps,
            }
        )

    @torch.no_grad()
    def evaluate(self) -> None:
        """Held-out loss by term, with the weights that a checkpoint has (averaged, if averaging is on)."""
        engine = self.engine
        sums: dict[str, float] = {}
        engine.model.eval()
        with self._loadable_weights(), engine.autocast():
            for batch in self.held_out:
                terms = self.objective.loss_terms(engine.model, batch.to(engine.device))
                for name, term in terms.items():
                    sums[name] = sums.get(name, 0.0) + float(term.double().sum())
        engine.model.train()
        scale = self.held_out_documents * self.recipe.objective.window
        losses = {name: total / scale for name, total in zip(sums, engine.total(list(sums.values())), strict=True)}
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
        with self._loadable_weights(), self.engine.autocast():
            samples = draw_samples(self.engine.module, self.tokenizer, self.recipe)
        if self.engine.is_main:
            assert self.progress is not None
            for sample in samples:
                self.run.append({"step": self.step, **sample}, SAMPLES)
            self.progress.note("sample", self.step, repr(samples[0]["text"][:200]))

    def _record(self, record: dict[str, Any]) -> None:
        if not self.engine.is_main:
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

    # ---- what is kept

    def _loadable_weights(self) -> Any:
        return self.average.in_place() if self.average is not None else nullcontext()

    def save(self) -> bool:
        """Writes a checkpoint and then rotates; returns whether it was saved. A failure is said, and the run goes on.

        Raises:
            NotFinite: a weight is not finite; nothing is written.
        """
        tensors, adam_step = self._state()
        rng = self.engine.random_states() if self._has_dropout() else {}
        outcome = self.engine.on_main(lambda: self._write_checkpoint(tensors, adam_step, rng))
        if outcome == _DIVERGED:
            self.outcome.reason = self.outcome.reason or "a weight is not finite"
            self._close()
            raise NotFinite
        return outcome == _SAVED

    def _state(self) -> tuple[dict[str, Tensor], int]:
        tensors, adam_step = self.engine.export_state()
        if self.average is not None and self.engine.is_main:
            tensors |= self.average.export_state()
        return tensors, adam_step

    def _has_dropout(self) -> bool:
        return self.begin.adapter is not None and self.begin.adapter.lora_dropout > 0

    def _weights(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> tensor of what from_pretrained shall load: the average, if there is one."""
        prefix = "ema/" if self.average is not None else "master/"
        return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}

    def _write_checkpoint(self, tensors: dict[str, Tensor], adam_step: int, rng: dict[str, Tensor]) -> str:
        infinite = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if infinite:
            newest, _ = checkpoint.latest(self.run.checkpoints)
            self._say(
                f"step {self.step}: {len(infinite)} tensors are not finite after the update ({infinite[0]} for one); "
                f"not saved; last good checkpoint: {newest or 'none'}; lower optimizer.learning_rate"
            )
            return _DIVERGED
        directory = self.run.checkpoints / checkpoint.step_name(self.step)
        record = self._state_record(adam_step)

        def write(temporary: Path) -> None:
            self.begin.write_weights(temporary, self._weights(tensors))
            checkpoint.write_state(temporary, tensors, record, rng)

        try:
            checkpoint.write_directory(directory, write)
        except OSError as error:
            self._say(f"step {self.step}: the checkpoint could not be saved ({error}); the run goes on")
            with suppress(OSError):  # on a full disk the log cannot take it either
                self.run.append({"step": self.step, "kind": "save_failed", "reason": str(error)})
            return _FAILED
        if self.recipe.training.save_total_limit is not None:
            checkpoint.rotate(self.run.checkpoints, self.recipe.training.save_total_limit, directory)
        return _SAVED

    def _state_record(self, adam_step: int) -> dict[str, Any]:
        documents = self.recipe.training.documents_per_step
        return {
            "format_version": checkpoint.FORMAT_VERSION,
            "step": self.step,
            "adam_step": adam_step,
            "scheduler": self.scheduler.state_dict(),
            "ordinals_consumed": self.step * documents,
            "tokens": self.tokens,
            "since_log": asdict(self.since_log),
            "world_size": self.engine.world_size,
            "data_digest": self.store.manifest.digest,
            "parent": self.begin.parent,
            "base_digest": self.begin.base_digest,
            "recipe": asdict(self.recipe),
        }

    def resume(self, directory: Path) -> None:
        """Puts weights, optimizer, schedule, average, generators and running means back as they were."""
        tensors, record, rng = checkpoint.read_state(directory)
        self.engine.import_state(tensors, record["adam_step"])
        restore_scheduler(self.scheduler, record["scheduler"])
        if self.average is not None:
            self.average.import_state(tensors)
        self.step, self.tokens = record["step"], record["tokens"]
        if self._has_dropout() and not self.engine.restore_random_states(rng):
            self._seed_dropout()
            if self.engine.is_main:
                announce("dropout's random state is that of another number of processes; dropout is drawn anew")
        self.since_log = _Sums(**record["since_log"])

    def finish(self) -> None:
        """Writes final/: the loadable weights of the last step, without training state."""
        tensors, _ = self._state()
        weights = self._weights(tensors)

        def write() -> None:
            checkpoint.write_directory(self.run.final, lambda directory: self.begin.write_weights(directory, weights))

        self.engine.on_main(write)
        self._say(f"complete at step {self.step}; weights in {self.run.final}")
        self._close()

    def _close(self) -> None:
        for tracker in self.trackers:
            tracker.close()
        if self.progress is not None:
            self.progress.close()


_SAVED, _FAILED, _DIVERGED = "saved", "failed", "diverged"
"""Outcomes of a save."""


@dataclass
class _Sums:
    """Sums since the last line of the log. Saved, so that a resumed run logs what an uninterrupted one does."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)

    def add(self, losses: dict[str, float], tokens: int, seconds: float) -> None:
        self.steps += 1
        self.tokens += tokens
        self.seconds += seconds
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + value


def build_objective(recipe: Recipe, config: LLaDAConfig, seed: int) -> Objective:
    """The recipe's objective for a model's configuration."""
    if recipe.objective.name == "mdm":
        return MDMObjective(config, seed, recipe.objective.window)
    assert isinstance(config, FlexMDMConfig)
    return FlexMDMObjective(config, seed)


def _identity(batches: list[MicroBatch]) -> list[MicroBatch]:
    return batches
