"""The verb `evaluate`: a checkpoint's score, and beside it everything that is needed to get the same score again."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """What a task found.

    Attributes:
        table: lines for the terminal.
        summary: the numbers of the table.
        settings: what the task was run with: sampler settings, digests of its data.
        files: rows of further JSONL files, by name.
    """

    table: str
    summary: dict[str, Any]
    settings: dict[str, Any]
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)


def evaluate(
    checkpoint: str,
    *,
    task: str,
    data: Path,
    split: str = "held_out",
    limit: int | None = None,
    steps: int = 128,
    order: str = "random",
    temperature: float | None = None,
    seed: int = 0,
    output: Path | None = None,
) -> None:
    """Score a checkpoint, print a table, and write it with its settings to `output`.

    Args:
        checkpoint: what `checkpoints.loading.load_model` takes: run, checkpoint, adapter, model directory, Hub id.
        task: "loss" (held-out loss by term) or "maze" (exact scoring of the planning task).
        data: a token store (loss) or the directory that `python -m retrofit.data.maze` wrote (maze).
        split: of the store; for the maze "tune", or else "eval" ("held_out" means it too).
        limit: documents, or problems of each level; None means all.
        steps, order, temperature, seed: of the sampler; `order` is for a FlexMDM alone. Temperature None means 1 for a
            FlexMDM and 0, LLaDA's own, for an MDM.
        output: a directory that does not exist or is empty. It receives settings.json, from the maze results.jsonl
            (a row a problem) and trace.jsonl (how some of them were written), and from a FlexMDM's loss gaps.jsonl (t,
            tokens missing and tokens expected of each document).

    Raises ValueError for an unknown task, data that do not fit, or an occupied `output`.
    """
    if task not in ("loss", "maze"):
        raise ValueError(f"--task {task}: unknown, choose loss or maze")
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}: must be at least 1")
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not an empty directory: choose another --output")

    import torch

    from retrofit.checkpoints.loading import load_source, load_tokenizer, resolve, tokenizer_files
    from retrofit.environment import packages

    source = resolve(checkpoint)
    model, tokenizer = load_source(source), load_tokenizer(source)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    if task == "maze":
        from .maze import score_maze

        score = score_maze(
            model,
            tokenizer,
            Path(data),
            split=split,
            limit=limit,
            steps=steps,
            order=order,
            temperature=temperature,
            seed=seed,
        )
    else:
        from .loss import recipe_window, score_loss

        window = recipe_window(source.directory)
        tokenizer_json = tokenizer_files(source).get("tokenizer.json")
        score = score_loss(
            model, Path(data), split=split, limit=limit, window=window, seed=seed, tokenizer_json=tokenizer_json
        )
    print(score.table)
    if output is not None:
        record = {
            "checkpoint": checkpoint,
            "checkpoint_digest": source.digest(),
            "model_type": model.config.model_type,
            "task": task,
            "split": split,
            "limit": limit,
            **score.settings,
            "summary": score.summary,
            "seconds": round(time.monotonic() - start, 2),
            "device": str(model.device),
            "packages": packages(),
        }
        _write(output, record, score.files)
        print(f"written   {output}")


def _write(output: Path, record: dict[str, Any], files: dict[str, list[dict[str, Any]]]) -> None:
    """Write all files under a temporary name, then give the directory its own."""
    temporary = output.parent / f".{output.name}.writing-{os.getpid()}"
    temporary.mkdir(parents=True)
    try:
        (temporary / "settings.json").write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", "utf-8")
        for name, rows in files.items():
            (temporary / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
        os.rename(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
