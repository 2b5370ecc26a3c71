"""Held-out loss by term, with noise that depends on nothing but the seed and the document's place in the order."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from retrofit.data.store import TokenStore
from retrofit.data.stream import StepStream
from retrofit.objective import FlexMDMObjective, MDMObjective
from retrofit.objective.objectives import MicroBatch

from . import Score

GAPS = "gaps.jsonl"
DOCUMENTS_AT_ONCE = 256
MAX_ROWS = 16384  # rows of one forward pass: bounds memory, changes nothing else


def score_loss(
    model: Any,
    data: Path,
    *,
    split: str,
    limit: int | None,
    window: int | None,
    seed: int,
    tokenizer_json: bytes | None = None,
    max_rows: int = MAX_ROWS,
) -> Score:
    """Mean loss of a document by term, in nats, with its standard error.

    One t a document, uniform and stratified over all of them, however training drew its own. The terms are those of
    training before its division by the window: `unmasking` and for a FlexMDM `insertion`. A FlexMDM's sum
    bounds -log p from above, but loosely, and an MDM's counts the end tokens of its canvas: the two must not be
    compared.

    Args:
        limit: measure only so many documents (drawn by the seed); None means all.
        window: an MDM's canvas; None means the longest document of the store.
        tokenizer_json: the model's, which has to be the one that made the store; None is not checked.

    Raises ValueError when the store does not fit the model or the split is empty.
    """
    store = TokenStore.open(data, split)  # type: ignore[arg-type]
    is_flexmdm = model.config.model_type == "flexmdm"
    longest = store.longest
    canvas = None if is_flexmdm else window or longest
    store.check_fits(model.config, window=canvas)
    store.check_tokenizer(tokenizer_json)
    if not len(store):
        raise ValueError(
            f"{data}: the split {split} is empty: prepare the data with a larger --held-out, or give --split"
        )
    objective = (
        FlexMDMObjective(model.config, seed) if is_flexmdm else MDMObjective(model.config, seed, canvas or longest)
    )
    total = min(limit or len(store), len(store))
    stream = StepStream(
        store,
        objective,
        seed=seed,
        documents_per_step=total,
        time_strata=total,
        max_tokens_per_device=max(max_rows, (canvas or longest) + 1),
        max_steps=1,
    )
    values: dict[str, list[float]] = {}
    missing: list[dict[str, float]] = []
    watched = _Watched(model)
    with torch.no_grad():
        for ordinals in torch.arange(total).split(DOCUMENTS_AT_ONCE):
            examples = stream.examples(ordinals)
            for rows in stream.cut(examples.lengths.tolist()):
                batch = examples.micro_batch(rows).to(model.device)
                for name, losses in objective.loss_terms(watched, batch).items():
                    values.setdefault(name, []).extend(losses.double().tolist())
                if is_flexmdm:
                    missing += _missing(batch, watched.expected_gaps)
    values["total"] = [sum(losses) for losses in zip(*values.values(), strict=True)]
    terms = {name: _mean_and_error(losses) for name, losses in values.items()}
    lines = [f"{'term':<12}{'nats a document':>16}{'standard error':>16}"]
    lines += [f"{name:<12}{term['mean']:>16.3f}{term['error']:>16.3f}" for name, term in terms.items()]
    lines.append(f"{total:,} documents of {split}")
    summary = {"documents": total, "terms": terms}
    settings = {
        "seed": seed,
        "window": canvas,
        "data": {"split_digest": store.digest, "manifest": store.manifest.digest},
    }
    return Score("\n".join(lines), summary, settings, {GAPS: missing} if is_flexmdm else {})


class _Watched:
    """The model, and the expected gaps of its last call."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.expected_gaps: torch.Tensor | None = None

    def __call__(self, **inputs: Any) -> Any:
        out = self.model(**inputs)
        self.expected_gaps = getattr(out, "expected_gaps", None)
        return out


def _missing(batch: MicroBatch, expected_gaps: torch.Tensor | None) -> list[dict[str, float]]:
    """Of each document its t, the tokens missing in its open gaps, and how many the model expects there."""
    assert expected_gaps is not None and batch.gaps is not None and batch.open_gaps is not None
    counts = torch.stack([expected_gaps.double(), batch.gaps.double()]) * batch.open_gaps
    sums = counts.new_zeros(2, len(batch.timesteps)).index_add(1, batch.packed.sequence_ids, counts)
    rows = zip(batch.timesteps.tolist(), *sums.tolist(), strict=True)
    return [{"t": t, "expected": expected, "missing": missing} for t, expected, missing in rows]


def recipe_window(directory: Path) -> int | None:
    """`objective.window` of the run that a checkpoint belongs to, or None where there is no recipe beside it."""
    from retrofit.recipe import load_recipe

    for folder in (directory, *list(directory.resolve().parents)[:2]):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml", []).objective.window
    return None


def _mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and its standard error (for stratified t an upper estimate)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return {"mean": mean, "error": math.sqrt(variance / len(values))}
