"""The planning task: mazes, paths, verdicts, and that no scored problem is trained on."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

import pytest

from retrofit.data.maze import (
    CELLS,
    LEVELS,
    LONGEST_PATH,
    WINDOW,
    Maze,
    draw_problems,
    draw_waypoints,
    flexmdm_row,
    main,
    mdm_row,
    verdict,
)
from retrofit.data.templates import Encoder, apply
from retrofit.data.tiny import byte_tokenizer

MAZE = Maze.draw(0)
#   0 1 2      a maze of 3 x 3 by hand: a ring without the step 0-1, and the middle hanging on 1
#   3 4 5
#   6 7 8
RING = Maze(3, 0, 0, frozenset({(1, 2), (2, 5), (5, 8), (7, 8), (6, 7), (3, 6), (0, 3), (1, 4)}))


def test_a_seed_gives_one_maze() -> None:
    assert Maze.draw(0) == MAZE and Maze.draw(1) != MAZE


def test_every_cell_is_reached_and_openings_are_counted() -> None:
    for openings in (0, 12):
        maze = Maze.draw(3, extra_openings=openings)
        assert len(maze.passages) == 35 + openings
        assert all(len(row) == 36 for row in maze.distances)


def test_there_are_several_shortest_ways() -> None:
    def ways(start: int, goal: int) -> int:
        if start == goal:
            return 1
        left = MAZE.distances[goal][start]
        return sum(ways(cell, goal) for cell in MAZE.neighbours[start] if MAZE.distances[goal][cell] < left)

    several = sum(ways(a, b) > 1 for a in range(36) for b in range(a))
    assert several > 100


def test_paths_are_as_long_as_the_issue_says() -> None:
    rng = random.Random(1)
    for level, median in (("easy", 10), ("medium", 20), ("hard", 29)):
        lengths = [MAZE.path_length(draw_waypoints(rng, MAZE, level)) for _ in range(1000)]
        assert abs(statistics.median(lengths) - median) <= 1


@pytest.mark.parametrize("level", LEVELS)
def test_the_path_to_learn_solves_its_problem_shortest(level: str) -> None:
    rng = random.Random(2)
    for _ in range(50):
        waypoints = draw_waypoints(rng, MAZE, level)
        path = MAZE.path(waypoints)
        judged = verdict(path, waypoints, MAZE)
        assert judged.solved and judged.shortest and len(path) == MAZE.path_length(waypoints) <= LONGEST_PATH


@pytest.mark.parametrize(
    ("path", "waypoints", "reason"),
    [
        ("125", "15", None),
        ("12585", "15", None),  # a detour
        ("", "15", "empty"),
        ("1?5", "15", "not a cell: '?' at 1"),
        ("?25", "15", "not a cell: '?' at 0"),
        ("129", "15", "not a cell: '9' at 2"),
        ("25", "15", "starts at 2, not 1"),
        ("12", "15", "ends at 2, not 5"),
        ("1225", "15", "stays on 2 at 1"),
        ("145", "15", "wall 4-5 at 1"),
        ("15", "15", "jump 1-5 at 0"),
        ("25", "235", "misses way-point 3 in its turn"),
        ("14125", "145", None),
        ("12141", "121", None),
        ("41252", "4512", "misses way-point 1 in its turn"),  # met, but not in its turn
        ("03", "03", None),
        ("23", "23", "jump 2-3 at 0"),  # neighbours by number, not in the grid
    ],
)
def test_a_verdict_gives_its_reason(path: str, waypoints: str, reason: str | None) -> None:
    judged = verdict(path, waypoints, RING)
    assert judged.reason == reason and judged.solved == (reason is None)


def test_a_detour_is_solved_but_not_shortest() -> None:
    assert verdict("125", "15", RING).shortest and not verdict("12585", "15", RING).shortest


def test_both_forms_hold_the_same_path_in_tokens_that_fit_the_window() -> None:
    encoder, rng = Encoder(byte_tokenizer(), {}), random.Random(3)
    for level in LEVELS:
        waypoints = draw_waypoints(rng, MAZE, level)
        path = list(MAZE.path(waypoints).encode())
        (flexmdm,) = apply("spans", flexmdm_row(waypoints, MAZE), encoder, WINDOW)
        (mdm,) = apply("spans", mdm_row(waypoints, MAZE), encoder, WINDOW - 1)
        assert flexmdm.token_ids == path
        kept = [token for token, kept in zip(flexmdm.token_ids, flexmdm.kept, strict=True) if kept]
        assert bytes(kept).decode() == waypoints
        assert mdm.token_ids == list(f"{waypoints}:".encode()) + path
        assert not flexmdm.open_gaps[0] and not flexmdm.open_gaps[-1] and all(flexmdm.open_gaps[1:-1])


def test_an_empty_hole_is_open_too() -> None:
    row = flexmdm_row("125", RING)
    assert [span["text"] for span in row["spans"]] == ["1", "", "2", "", "5"]
    assert [span["kept"] for span in row["spans"]] == [True, False, True, False, True]


def test_no_scored_problem_is_trained_on() -> None:
    small = Maze.draw(0, size=3, extra_openings=2)  # 504 easy problems, so that chance would repeat them
    scored, training = draw_problems(small, seed=0, rows=3000, num_eval=30)
    lists = [waypoints for problems in scored.values() for waypoints in problems]
    assert len(lists) == len(set(lists)) == 6 * 30
    trained = list(training)
    assert len(trained) == 3000 and not set(trained) & set(lists) and len(set(trained)) < 3000


def test_the_command_writes_every_file_and_refuses_to_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = [str(tmp_path / "maze"), "--seed", "5", "--rows", "30", "--eval", "4"]
    main(arguments)
    assert "30 training paths" in capsys.readouterr().out
    names = {f"{split}-{level}.jsonl" for split in ("eval", "tune") for level in LEVELS}
    assert {file.name for file in (tmp_path / "maze").iterdir()} == names | {"flexmdm.jsonl", "mdm.jsonl", "maze.json"}
    assert Maze.read(tmp_path / "maze" / "maze.json") == Maze.draw(5)
    rows = [json.loads(line) for line in (tmp_path / "maze" / "eval-hard.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["waypoints"]) == 7 and set(row["waypoints"]) <= set(CELLS) for row in rows)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "not an empty directory" in capsys.readouterr().err


def test_the_same_command_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        main([str(tmp_path / name), "--rows", "30", "--eval", "4"])
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.parametrize("values", ["", "{}", "[]", '{"size": 6, "seed": 0, "extra_openings": 0, "passages": "0"}'])
def test_a_broken_maze_file_is_refused(tmp_path: Path, values: str) -> None:
    (tmp_path / "maze.json").write_text(values)
    with pytest.raises(ValueError, match="maze.json: not a maze"):
        Maze.read(tmp_path / "maze.json")
    with pytest.raises(ValueError, match="no such file"):
        Maze.read(tmp_path / "absent.json")


@pytest.mark.parametrize(("size", "openings"), [(2, 0), (7, 0), (6, 26), (6, -1)])
def test_a_maze_that_cannot_be_drawn_is_refused(size: int, openings: int) -> None:
    with pytest.raises(ValueError, match="--size|--openings"):
        Maze.draw(0, size, openings)
