"""Exact scoring: an oracle that knows the paths scores 100 % through the real samplers, and everything is recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retrofit.data.maze import CELLS, LEVELS, PROMPT_END, WINDOW, Maze, main
from retrofit.data.tiny import byte_tokenizer, init
from retrofit.evaluation import evaluate
from retrofit.evaluation.maze import flexmdm_prompt, score_maze, wilson
from retrofit.flexmdm import FlexMDMConfig, FlexMDMForMaskedDiffusion, LLaDAConfig

MASK, END, VOCABULARY = 258, 257, 264
IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "mask_token_id": MASK, "pad_token_id": END, "eos_token_id": END}
SHAPE: dict[str, Any] = {"d_model": 8, "n_layers": 1, "n_heads": 2, "mlp_hidden_size": 8, "max_sequence_length": 128}
SAMPLER: dict[str, Any] = {"steps": 8, "order": "random", "temperature": None, "seed": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "maze"
    main([str(path), "--rows", "30", "--eval", "5"])
    return path


def certain(tokens: list[int]) -> torch.Tensor:
    """Logits [M, V] that leave no doubt."""
    logits = torch.full((len(tokens), VOCABULARY), -30.0)
    logits[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.int64)] = 30.0
    return logits


class FlexMDMOracle:
    """Knows each hole: what is missing comes at the hole's end, so that what stands there is always its beginning."""

    def __init__(self, maze: Maze, spoil: str = "") -> None:
        self.maze, self.spoil, self.config = maze, spoil, FlexMDMConfig(**IDS, **SHAPE)
        self.device = torch.device("cpu")

    def __call__(self, packed, timesteps):
        gaps, tokens = torch.zeros(len(packed.tokens)), []
        for start, end in zip(packed.cu_seqlens[:-1].tolist(), packed.cu_seqlens[1:].tolist(), strict=True):
            rows = range(start, end - 1)
            waypoints = "".join(chr(packed.tokens[row]) for row in rows if packed.kept[row])
            segments = self.maze.segments(waypoints)
            hole, seen = -1, 0
            for row in rows:
                if packed.kept[row]:
                    if hole >= 0:
                        gaps[row] = len(segments[hole]) - seen
                    hole, seen = hole + 1, 0
                    continue
                if packed.tokens[row] == MASK:
                    tokens.append(ord(self.spoil or segments[hole][seen]))
                seen += 1
        return SimpleNamespace(logits=certain(tokens), expected_gaps=gaps)


class MDMOracle:
    """Knows the path for its prompt, then the end."""

    def __init__(self, maze: Maze) -> None:
        self.maze, self.config, self.device = maze, LLaDAConfig(**IDS, **SHAPE), torch.device("cpu")

    def __call__(self, packed, logit_rows):
        whole = []
        for row in packed.tokens.split(packed.lengths.tolist()):
            prompt = bytes(row[: row.tolist().index(ord(PROMPT_END))].tolist()).decode()
            answer = list(self.maze.path(prompt).encode())
            whole += [0] * (len(prompt) + 1) + answer + [END] * (len(row) - len(prompt) - 1 - len(answer))
        return SimpleNamespace(logits=certain([whole[row] for row in logit_rows.tolist()]))


@pytest.mark.parametrize("oracle", [FlexMDMOracle, MDMOracle])
def test_an_oracle_solves_everything_shortest(data: Path, oracle: type) -> None:
    model = oracle(Maze.read(data / "maze.json"))
    score = score_maze(model, byte_tokenizer(), data, split="held_out", limit=None, **SAMPLER)
    levels = score.summary["levels"]
    assert list(levels) == list(LEVELS)
    assert all(level["solved"] == level["shortest"] == level["problems"] == 5 for level in levels.values())
    assert score.settings["split"] == "eval" and score.table.count("100.0%") >= 3
    problems = [json.loads(line)["waypoints"] for line in (data / "eval-easy.jsonl").read_text().splitlines()]
    assert [row["waypoints"] for row in score.files["results.jsonl"]][:5] == problems


def test_a_wrong_step_is_failed_with_its_reason(data: Path) -> None:
    model = FlexMDMOracle(Maze.read(data / "maze.json"), spoil="?")
    score = score_maze(model, byte_tokenizer(), data, split="tune", limit=2, **SAMPLER)
    rows = score.files["results.jsonl"]
    assert len(rows) == 6 and not any(row["solved"] for row in rows) and "not a cell: '?'" in rows[0]["reason"]


def test_the_trace_ends_with_the_output_and_shows_masks(data: Path) -> None:
    model = FlexMDMOracle(Maze.read(data / "maze.json"))
    score = score_maze(model, byte_tokenizer(), data, split="eval", limit=1, **SAMPLER)
    (row, *_), frames = score.files["results.jsonl"], score.files["trace.jsonl"]
    easy = [frame["text"] for frame in frames if frame["level"] == "easy"]
    assert (
        easy[-1] == row["output"]
        and len(easy) == SAMPLER["steps"] + 2
        and easy[0] == row["waypoints"]
        and any("_" in text for text in easy)
    )


def test_a_flexmdm_is_given_way_points_with_open_gaps_between() -> None:
    prompt = flexmdm_prompt(byte_tokenizer(), "09Z")
    assert prompt.token_ids == list(b"09Z") and prompt.open_gaps == [False, True, True, False]


def test_an_mdm_writes_into_the_window_it_was_trained_with(data: Path) -> None:
    sizes = []

    class Measured(MDMOracle):
        def __call__(self, packed, logit_rows):
            sizes.append(set(packed.lengths.tolist()))
            return super().__call__(packed, logit_rows)

    score = score_maze(
        Measured(Maze.read(data / "maze.json")),
        byte_tokenizer(),
        data,
        split="eval",
        limit=1,
        **{**SAMPLER, "steps": 1000},
    )
    assert all(size == {WINDOW} for size in sizes) and score.settings["sampler"]["window"] == WINDOW
    assert score.settings["sampler"]["temperature"] == 0.0
    assert score.summary["levels"]["easy"]["forwards"] == WINDOW - len("09Z:")


def test_wilsons_interval_is_the_published_one() -> None:
    # Newcombe (1998), table I: 81/263 and 0/20 and 1/29 by the score method without continuity correction.
    for (successes, trials), (low, high) in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        found = wilson(successes, trials)
        assert abs(found[0] - low) < 1e-4 and abs(found[1] - high) < 1e-4
    assert wilson(0, 0) == (0.0, 1.0) and wilson(5, 5)[1] == 1.0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {"layers": 1, "d_model": 16, "heads": 2, "mlp_hidden": 16, "max_sequence_length": 512}
    init(folder / "mdm", **shape)
    torch.manual_seed(0)
    model = FlexMDMForMaskedDiffusion.from_pretrained(folder / "mdm", flexmdm_config={"mean_deletable_tokens": 15.0})
    model.save_pretrained(folder / "flexmdm")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "mdm" / name, folder / "flexmdm" / name)
    return {name: folder / name for name in ("mdm", "flexmdm")}


@pytest.mark.parametrize("kind", ["mdm", "flexmdm"])
def test_the_score_is_written_with_all_that_repeats_it(
    checkpoints, data: Path, tmp_path: Path, kind: str, capsys
) -> None:
    written = []
    for name in "ab":
        options: dict[str, Any] = {
            "task": "maze",
            "data": data,
            "limit": 2,
            "steps": 4,
            "seed": 3,
            "output": tmp_path / name,
        }
        evaluate(str(checkpoints[kind]), **options)
        written.append((tmp_path / name / "results.jsonl").read_bytes())
    assert written[0] == written[1] and written[0].count(b"\n") == 2 * len(LEVELS)
    settings = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert settings["model_type"] == {"mdm": "llada", "flexmdm": "flexmdm"}[kind]
    assert settings["sampler"]["seed"] == 3 and settings["sampler"]["steps"] == 4
    assert set(settings["data"]) == {"maze.json", *(f"eval-{level}.jsonl" for level in LEVELS)}
    assert {"checkpoint_digest", "packages", "seconds", "summary", "limit"} <= set(settings)
    assert "95 % interval" in capsys.readouterr().out


def test_bad_arguments_are_refused(checkpoints, data: Path, tmp_path: Path) -> None:
    model = str(checkpoints["flexmdm"])
    options: dict[str, Any] = {"task": "maze", "data": data, "limit": 1, "steps": 2}
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    for changes, named in (
        ({"task": "chess"}, "--task chess"),
        ({"limit": 0}, "--limit 0"),
        ({"output": tmp_path / "full"}, "not an empty directory"),
        ({"split": "train"}, "--split train"),
        ({"data": tmp_path}, "maze.json: no such file"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate(model, **{**options, **changes})


@pytest.mark.parametrize("line", ["{}", '{"waypoints": "0"}', '{"waypoints": "0!"}', '{"waypoints": 3}', "x"])
def test_a_broken_problem_is_refused_with_its_line(data: Path, tmp_path: Path, line: str) -> None:
    shutil.copytree(data, tmp_path / "copy")
    problems = tmp_path / "copy" / "eval-easy.jsonl"
    problems.write_text(problems.read_text() + line + "\n")
    model = FlexMDMOracle(Maze.read(data / "maze.json"))
    with pytest.raises(ValueError, match=r"eval-easy.jsonl:6: expected"):
        score_maze(model, byte_tokenizer(), tmp_path / "copy", split="eval", limit=None, **SAMPLER)


def test_every_cell_is_one_token() -> None:
    assert byte_tokenizer()(CELLS, add_special_tokens=False)["input_ids"] == list(CELLS.encode())
