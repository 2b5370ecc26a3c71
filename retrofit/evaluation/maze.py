"""Exact scoring of the planning task: does the written path lead through the way-points?"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from retrofit.data.maze import CELLS, END_SIGN, LEVELS, MASK_SIGN, PROMPT_END, WINDOW, Maze, verdict
from retrofit.data.templates import Piece, assemble, encode
from retrofit.flexmdm.mdm_sampling import sample_mdm
from retrofit.flexmdm.sampling import Prompt, Sample, sample_flexmdm

from . import Score

TRACED = 8  # problems of a level whose writing is followed; the first solved one of them is kept
LATE_ALPHA = 0.99


def score_maze(
    model: Any,
    tokenizer: Any,
    data: Path,
    *,
    split: str,
    limit: int | None,
    steps: int,
    order: str,
    temperature: float | None,
    seed: int,
) -> Score:
    """Sample a path for every problem of `data`/{eval,tune}-LEVEL.jsonl and judge it.

    A FlexMDM is given the way-points as kept tokens with the gaps between them open. An MDM is given them as a prompt,
    writes into the window it was trained with (`window` of maze.json), and takes no more steps than that has tokens.

    Raises ValueError for an unknown split, or files that are missing or not problems.
    """
    split = "eval" if split == "held_out" else split
    if split not in ("eval", "tune"):
        raise ValueError(f"--split {split}: the maze has eval (or held_out, the same) and tune")
    is_flexmdm = model.config.model_type == "flexmdm"
    maze, window = Maze.read(data / "maze.json"), _window(data / "maze.json")
    problems = {level: _problems(data / f"{split}-{level}.jsonl", maze)[:limit] for level in LEVELS}
    temperature = temperature if temperature is not None else (1.0 if is_flexmdm else 0.0)
    write = _flexmdm_writer if is_flexmdm else _mdm_writer
    settings: dict[str, Any] = {"sampler": {"steps": steps, "temperature": temperature, "seed": seed}}
    settings["sampler"] |= (
        {"order": order, "counts": "binomial"} if is_flexmdm else {"window": window, "block_length": None}
    )
    rows, traces, summary, lines = [], [], {}, [HEADER]
    for number, (level, waypoints) in enumerate(problems.items()):
        watch = _Watch(model, tokenizer, level, steps, str if is_flexmdm else lambda w: _blank_canvas(w, window))
        indices = [1_000_000 * number + i for i in range(len(waypoints))]  # other noise for each level
        samples = write(model, tokenizer, waypoints, window, settings["sampler"], indices, watch)
        watch.clear()
        paths = [_path(sample, is_flexmdm=is_flexmdm) for sample in samples]
        judged = zip(waypoints, paths, samples, strict=True)
        level_rows = [_judge(level, problem, path, sample, tokenizer, maze) for problem, path, sample in judged]
        rows += level_rows
        traces += watch.trace(level_rows)
        summary[level] = _summarise(level_rows, samples, watch)
        lines.append(_line(level, summary[level]))
    names = ["maze.json", *(f"{split}-{level}.jsonl" for level in LEVELS)]
    settings["data"] = {name: hashlib.sha256((data / name).read_bytes()).hexdigest() for name in names}
    settings |= {"split": split, "maze": maze.to_dict()}
    if is_flexmdm:
        settings["schedules"] = model.config.schedules.to_dict()
    files = {"results.jsonl": rows, "trace.jsonl": traces}
    return Score("\n".join(lines), {"levels": summary}, settings, files)


def wilson(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % by default); (0, 1) without trials."""
    if not trials:
        return 0.0, 1.0
    p, n = successes / trials, trials
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def flexmdm_prompt(tokenizer: Any, waypoints: str) -> Prompt:
    """Way-points as kept tokens; the gaps between them are open, those outside closed, as in the training rows."""
    pieces = [Piece(encode(tokenizer, waypoints[0]), True)]
    for waypoint in waypoints[1:]:
        pieces += [Piece([], False), Piece(encode(tokenizer, waypoint), True)]
    document = assemble(pieces)
    return Prompt(document.token_ids, document.open_gaps)


def _flexmdm_writer(
    model: Any, tokenizer: Any, problems: Sequence[str], window: int, sampler: dict[str, Any], indices: Any, trace: Any
) -> list[Sample]:
    prompts = [flexmdm_prompt(tokenizer, waypoints) for waypoints in problems]
    return sample_flexmdm(model, prompts, **sampler, indices=indices, trace=trace)


def _mdm_writer(
    model: Any, tokenizer: Any, problems: Sequence[str], window: int, sampler: dict[str, Any], indices: Any, trace: Any
) -> list[Sample]:
    prompts = [encode(tokenizer, waypoints + PROMPT_END) for waypoints in problems]
    answer_length = window - max(map(len, prompts), default=0)
    return sample_mdm(
        model,
        prompts,
        answer_length=answer_length,
        steps=min(sampler["steps"], answer_length),
        temperature=sampler["temperature"],
        seed=sampler["seed"],
        indices=indices,
        trace=trace,
    )


def _blank_canvas(waypoints: str, window: int) -> str:
    """What an MDM starts from, as text."""
    return (waypoints + PROMPT_END).ljust(window, MASK_SIGN)


def _path(sample: Sample, *, is_flexmdm: bool) -> list[int]:
    """The tokens of the path: the whole sequence of a FlexMDM, what follows the prompt for an MDM."""
    pairs = zip(sample.token_ids, sample.kept, strict=True)
    return [token for token, kept in pairs if is_flexmdm or not kept]


def _judge(level: str, waypoints: str, path: list[int], sample: Sample, tokenizer: Any, maze: Maze) -> dict[str, Any]:
    output = tokenizer.decode(path)
    judged = verdict(output, waypoints, maze)
    return {
        "level": level,
        "waypoints": waypoints,
        "output": output,
        "length": len(path),
        "solved": judged.solved,
        "reason": judged.reason,
        "shortest": judged.shortest,
        "truncated": sample.truncated,
        "forwards": sample.forwards,
    }


HEADER = f"{'level':<8}{'solved':>10}{'':>9}{'95 % interval':>16}{'shortest':>10}{'mean length':>13}{'forwards':>10}"


def _line(level: str, summary: dict[str, Any]) -> str:
    low, high = summary["interval"]
    return (
        f"{level:<8}{summary['solved']:>5}/{summary['problems']:<4}{summary['success']:>8.1%} "
        f"{low:>8.1%} -{high:>6.1%}{summary['shortest']:>10}{summary['mean_length']:>13.1f}{summary['forwards']:>10.1f}"
    )


def _summarise(rows: Sequence[dict[str, Any]], samples: Sequence[Sample], watch: _Watch) -> dict[str, Any]:
    solved = sum(row["solved"] for row in rows)
    return {
        "problems": len(rows),
        "solved": solved,
        "success": solved / len(rows),
        "interval": list(wilson(solved, len(rows))),
        "shortest": sum(row["shortest"] for row in rows),
        "mean_length": statistics.fmean(row["length"] for row in rows),
        "forwards": statistics.fmean(sample.forwards for sample in samples),
        "truncated": sum(sample.truncated for sample in samples),
        # Tokens that a FlexMDM inserts when alpha has passed .99: late, they see little unmasking.
        "mean_late_insertions": watch.mean_late_insertions,
    }


@dataclass
class _Watch:
    """Follows the sampler: a line on the terminal, frames of the first problems, and how much was inserted late."""

    model: Any
    tokenizer: Any
    level: str
    steps: int
    start: Callable[[str], str]  # way-points -> the text at t = 0
    frames: list[tuple[float, list[str]]] = field(default_factory=list)
    lengths: list[tuple[float, int, int]] = field(default_factory=list)  # t, tokens of all sequences, sequences

    def __call__(self, step: int, t: float, sequences: list[list[int]]) -> None:
        self.frames.append((t, [self._text(sequence) for sequence in sequences[:TRACED]]))
        self.lengths.append((t, sum(map(len, sequences)), len(sequences)))
        if sys.stderr.isatty():
            print(f"\r\x1b[K{self.level}: step {step + 1} of {self.steps}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def _text(self, sequence: Sequence[int]) -> str:
        config = self.model.config
        signs = {config.mask_token_id: MASK_SIGN, config.eos_token_id: END_SIGN}
        return "".join(signs.get(token) or self.tokenizer.decode([token]) for token in sequence)

    @property
    def mean_late_insertions(self) -> float | None:
        if self.model.config.model_type != "flexmdm" or not self.lengths:
            return None
        schedules = self.model.config.schedules
        alphas = schedules.alpha(torch.tensor([t for t, _, _ in self.lengths], dtype=torch.float64)).tolist()
        first = next((i for i, alpha in enumerate(alphas) if alpha >= LATE_ALPHA), len(alphas) - 1)
        _, last, sequences = self.lengths[-1]
        return (last - self.lengths[first][1]) / max(sequences, 1)

    def trace(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of trace.jsonl for the first solved problem among those followed, else for the first."""
        chosen = next((i for i, row in enumerate(rows[:TRACED]) if row["solved"]), 0)
        waypoints = rows[chosen]["waypoints"]
        texts = [(0.0, self.start(waypoints)), *((t, every[chosen]) for t, every in self.frames)]
        return [
            {"level": self.level, "waypoints": waypoints, "frame": frame, "t": t, "text": text}
            for frame, (t, text) in enumerate(texts)
        ]


def _problems(path: Path, maze: Maze) -> list[str]:
    """The way-point lists of a problem file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file: make it with `python -m retrofit.data.maze OUT`")
    problems, cells = [], CELLS[: maze.size**2]
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            waypoints = json.loads(line)["waypoints"]
            if len(waypoints) < 2 or any(cell not in cells for cell in waypoints):
                raise ValueError(f"{waypoints!r} is not a list of at least two cells")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path}:{number}: expected {{"waypoints": "09Z"}} ({error})') from error
        problems.append(waypoints)
    if not problems:
        raise ValueError(f"{path}: no problems in there")
    return problems


def _window(path: Path) -> int:
    return int(json.loads(path.read_text("utf-8")).get("window", WINDOW))
