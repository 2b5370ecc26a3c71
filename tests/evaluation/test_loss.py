"""Held-out loss: the same for the same seed, however it is cut; by term, with its error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.data.maze import Maze, draw_problems, flexmdm_row
from retrofit.data.preprocess import preprocess
from retrofit.data.tiny import init
from retrofit.evaluation import evaluate
from retrofit.evaluation.loss import _missing, recipe_window, score_loss
from retrofit.flexmdm import FlexMDMForMaskedDiffusion, LLaDAForMaskedDiffusion


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loss")
    init(path / "mdm", layers=1, d_model=16, heads=2, mlp_hidden=16, max_sequence_length=64)
    maze = Maze.draw(0)
    _, problems = draw_problems(maze, seed=0, rows=300, num_eval=1)
    (path / "rows.jsonl").write_text("".join(json.dumps(flexmdm_row(w, maze)) + "\n" for w in problems))
    options: dict[str, Any] = {"tokenizer": str(path / "mdm"), "template": "spans", "max_length": 60, "held_out": 0.5}
    preprocess([str(path / "rows.jsonl")], path / "data", max_rejected=0.0, seed=0, **options)
    return path


def flexmdm(folder: Path) -> FlexMDMForMaskedDiffusion:
    torch.manual_seed(0)
    return FlexMDMForMaskedDiffusion.from_pretrained(
        folder / "mdm", flexmdm_config={"mean_deletable_tokens": 15.0}
    ).eval()


def score(model, folder: Path, **changes):
    options = {"split": "held_out", "limit": None, "window": None, "seed": 0, **changes}
    return score_loss(model, folder / "data", **options).summary


def test_a_flexmdm_has_two_terms_and_their_sum(folder: Path) -> None:
    terms = score(flexmdm(folder), folder)["terms"]
    assert list(terms) == ["unmasking", "insertion", "total"]
    assert math.isclose(terms["total"]["mean"], terms["unmasking"]["mean"] + terms["insertion"]["mean"], rel_tol=1e-9)
    assert all(term["error"] > 0 for term in terms.values())


def test_expected_and_missing_tokens_are_those_of_the_open_gaps(folder: Path) -> None:
    """At the start the head's guess is a function of t alone: n (1 - alpha) over n alpha + 1 for each row."""
    options: dict[str, Any] = {"split": "held_out", "limit": 40, "window": None, "seed": 0}
    rows = score_loss(flexmdm(folder), folder / "data", **options).files["gaps.jsonl"]
    cut = score_loss(flexmdm(folder), folder / "data", **options, max_rows=100).files["gaps.jsonl"]
    assert len(rows) == 40 and all(math.isclose(a["t"], b["t"]) for a, b in zip(*map(by_t, (rows, cut)), strict=True))
    for row, other in zip(by_t(rows), by_t(cut), strict=True):
        assert row["missing"] == other["missing"] and math.isclose(row["expected"], other["expected"], rel_tol=1e-5)
        guess = (1 - row["t"]) * 15 / (15 * row["t"] + 1)  # per gap, of which few are closed
        assert row["missing"] == int(row["missing"]) >= 0
        assert round(row["expected"] / guess, 3) == pytest.approx(round(row["expected"] / guess), abs=0.02)
    early = [row["missing"] for row in rows if row["t"] < 0.2]
    late = [row["missing"] for row in rows if row["t"] > 0.8]
    assert sum(early) / len(early) > 5 > 2 > sum(late) / len(late)
    assert (
        score_loss(LLaDAForMaskedDiffusion.from_pretrained(folder / "mdm").eval(), folder / "data", **options).files
        == {}
    )


def test_closed_gaps_count_neither_as_expected_nor_as_missing() -> None:
    batch: Any = SimpleNamespace(
        timesteps=torch.tensor([0.25, 0.5]),
        gaps=torch.tensor([1, 2, 4, 8, 16]),
        open_gaps=torch.tensor([True, False, True, True, False]),
        packed=SimpleNamespace(sequence_ids=torch.tensor([0, 0, 0, 1, 1])),
    )
    rows = _missing(batch, torch.tensor([0.5, 10.0, 1.0, 2.0, 10.0]))
    assert rows == [{"t": 0.25, "expected": 1.5, "missing": 5.0}, {"t": 0.5, "expected": 2.0, "missing": 8.0}]


def by_t(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: row["t"])


def test_the_loss_does_not_depend_on_how_it_is_cut_and_repeats(folder: Path) -> None:
    model = flexmdm(folder)
    whole, cut = score(model, folder), score(model, folder, max_rows=100)
    for name, term in whole["terms"].items():
        assert math.isclose(term["mean"], cut["terms"][name]["mean"], rel_tol=1e-5)
    assert score(model, folder) == whole and score(model, folder, seed=1) != whole


def test_an_mdm_that_knows_nothing_pays_the_logarithm_of_the_vocabulary_for_every_token(folder: Path) -> None:
    model = LLaDAForMaskedDiffusion.from_pretrained(folder / "mdm")
    with torch.no_grad():
        model.model.transformer["ff_out"].weight.zero_()
    term = score(model, folder, window=64)["terms"]["unmasking"]
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    kept = sum(span["kept"] for row in rows for span in row["spans"]) / len(rows)
    expected = (64 - kept) * math.log(model.config.vocab_size)
    assert abs(term["mean"] - expected) < 4 * term["error"] and term["error"] < 0.1 * expected


def test_a_limit_measures_so_many_documents(folder: Path) -> None:
    model = flexmdm(folder)
    assert score(model, folder, limit=7)["documents"] == 7
    assert score(model, folder, limit=10**6)["documents"] == score(model, folder)["documents"]


def test_a_store_that_does_not_fit_is_refused(folder: Path) -> None:
    model = flexmdm(folder)
    model.config.max_sequence_length = 8
    with pytest.raises(ValueError, match="max_sequence_length of the model is 8"):
        score(model, folder)
    with pytest.raises(ValueError, match="no split 'test'"):
        score(flexmdm(folder), folder, split="test")


def test_an_empty_split_is_refused(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": str(folder / "mdm"), "template": "spans", "max_length": 60, "held_out": 0.0}
    preprocess([str(folder / "rows.jsonl")], tmp_path / "data", max_rejected=0.0, seed=0, **options)
    with pytest.raises(ValueError, match="held_out is empty"):
        score(flexmdm(folder), tmp_path)


def test_the_verb_prints_and_writes_the_terms(folder: Path, tmp_path: Path, capsys) -> None:
    evaluate(str(folder / "mdm"), task="loss", data=folder / "data", limit=20, output=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["summary"]["documents"] == 20 and len(settings["data"]["split_digest"]) == 64
    assert "nats a document" in capsys.readouterr().out


def test_the_window_of_an_mdm_is_that_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "run"
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "recipe.yaml").write_text("")
    recipe = SimpleNamespace(objective=SimpleNamespace(window=77))
    monkeypatch.setattr("retrofit.recipe.load_recipe", lambda path, overrides: recipe)
    assert recipe_window(run / "checkpoints" / "step-00000001") == 77 and recipe_window(run) == 77
    assert recipe_window(tmp_path) is None
