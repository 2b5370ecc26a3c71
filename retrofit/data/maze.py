"""The planning task: a path through way-points in one fixed maze.

    python -m retrofit.data.maze OUT --seed 0 --rows 100000

A maze of 6 x 6 cells is a random spanning tree with some walls taken out, so that there are several ways. A cell is one
character of 0-9A-Z (one token), a path the string of its cells. A problem is a list of way-points: start, inner ones,
goal; levels easy, medium and hard have 1, 3 and 5 inner ones. The path to learn goes through them in order, from each
to the next by a shortest way (of several the first in the order of cells). Any valid path counts as solved.

Files in OUT: `flexmdm.jsonl` and `mdm.jsonl` hold the same documents as rows of the template `spans`: for a FlexMDM the
way-points are kept and the cells between them learnt, for an MDM the way-points are a prompt ("09Z:") and the path the
answer. `eval-LEVEL.jsonl` and `tune-LEVEL.jsonl` hold way-point lists that are neither in training nor in each other;
`maze.json` the maze. Settings are chosen on `tune`, results reported on `eval`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

CELLS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LEVELS = {"easy": 1, "medium": 3, "hard": 5}  # inner way-points
SPLITS = ("eval", "tune")
PROMPT_END = ":"
MASK_SIGN, END_SIGN = "_", "."  # how a mask and an end token appear in a trace
# Tokens of an MDM's canvas: prompt, path, and at least one end token. Problems with longer paths are not drawn.
WINDOW = 64
LONGEST_PATH = WINDOW - (max(LEVELS.values()) + 2) - len(PROMPT_END) - 1


@dataclass(frozen=True)
class Maze:
    """A maze of size x size cells, numbered row by row.

    Attributes:
        seed, extra_openings: what it was drawn with.
        passages: pairs (a, b), a < b, of neighbouring cells with no wall between them.
    """

    size: int
    seed: int
    extra_openings: int
    passages: frozenset[tuple[int, int]] = field(repr=False)

    @classmethod
    def draw(cls, seed: int, size: int = 6, extra_openings: int = 12) -> Maze:
        """A spanning tree grown depth first, then `extra_openings` further walls taken out at random.

        Raises ValueError for a size outside 3..6 or more openings than there are walls.
        """
        if not 3 <= size <= 6:
            raise ValueError(
                f"--size {size}: from 3 (there are up to 7 way-points) to 6 (a cell is one of 36 characters)"
            )
        rng = random.Random(seed)
        walls = [(a, b) for a in range(size * size) for b in (a + 1, a + size) if _beside(a, b, size)]
        stack, seen, passages = [rng.randrange(size * size)], set[int](), set[tuple[int, int]]()
        seen.add(stack[0])
        while stack:
            around = [b for pair in walls if stack[-1] in pair for b in pair if b not in seen]
            if not around:
                stack.pop()
                continue
            chosen = rng.choice(around)
            passages.add((min(stack[-1], chosen), max(stack[-1], chosen)))
            seen.add(chosen)
            stack.append(chosen)
        closed = [wall for wall in walls if wall not in passages]
        if not 0 <= extra_openings <= len(closed):
            raise ValueError(f"--openings {extra_openings}: this maze has {len(closed)} walls to open")
        return cls(size, seed, extra_openings, frozenset(passages | set(rng.sample(closed, extra_openings))))

    def is_open(self, a: int, b: int) -> bool:
        """Whether one step leads from cell a to cell b."""
        return (min(a, b), max(a, b)) in self.passages

    @cached_property
    def neighbours(self) -> list[list[int]]:
        """The cells that one step leads to, for each cell, in rising order."""
        return [[b for b in range(self.size**2) if self.is_open(a, b)] for a in range(self.size**2)]

    @cached_property
    def distances(self) -> list[list[int]]:
        """Steps of a shortest way between every two cells."""
        return [self._distances_from(cell) for cell in range(self.size**2)]

    def _distances_from(self, start: int) -> list[int]:
        distances = {start: 0}
        queue = deque([start])
        while queue:
            cell = queue.popleft()
            for neighbour in self.neighbours[cell]:
                if neighbour not in distances:
                    distances[neighbour] = distances[cell] + 1
                    queue.append(neighbour)
        return [distances[cell] for cell in range(self.size**2)]

    def shortest(self, start: int, goal: int) -> list[int]:
        """The cells of a shortest way, both ends included: of several the first in the order of cells."""
        path = [start]
        while path[-1] != goal:
            left = self.distances[goal][path[-1]]
            path.append(next(cell for cell in self.neighbours[path[-1]] if self.distances[goal][cell] < left))
        return path

    def segments(self, waypoints: str) -> list[str]:
        """The cells strictly between each way-point and the next, one string for each."""
        cells = [CELLS.index(cell) for cell in waypoints]
        ways = (self.shortest(a, b) for a, b in zip(cells, cells[1:], strict=False))
        return ["".join(CELLS[cell] for cell in way[1:-1]) for way in ways]

    def path(self, waypoints: str) -> str:
        """The path to learn: all way-points and the cells between them."""
        return waypoints[0] + "".join(s + w for s, w in zip(self.segments(waypoints), waypoints[1:], strict=True))

    def path_length(self, waypoints: str) -> int:
        """Cells of that path."""
        cells = [CELLS.index(cell) for cell in waypoints]
        return 1 + sum(self.distances[a][b] for a, b in zip(cells, cells[1:], strict=False))

    def to_dict(self) -> dict[str, Any]:
        passages = " ".join(sorted(CELLS[a] + CELLS[b] for a, b in self.passages))
        return {"size": self.size, "seed": self.seed, "extra_openings": self.extra_openings, "passages": passages}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Maze:
        passages = frozenset((CELLS.index(a), CELLS.index(b)) for a, b in values["passages"].split())
        return cls(values["size"], values["seed"], values["extra_openings"], passages)

    @classmethod
    def read(cls, path: Path) -> Maze:
        """Read a maze.json. Raises ValueError when it is absent or not one."""
        try:
            return cls.from_dict(json.loads(path.read_text("utf-8")))
        except FileNotFoundError as error:
            raise ValueError(f"{path}: no such file: make it with `python -m retrofit.data.maze OUT`") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: not a maze ({error}): make it with `python -m retrofit.data.maze OUT`"
            ) from error


@dataclass(frozen=True)
class Verdict:
    """Whether a path solves a problem, why not, and if so whether no shorter path does."""

    solved: bool
    reason: str | None
    shortest: bool = False


def verdict(path: str, waypoints: str, maze: Maze) -> Verdict:
    """Judge a path: it starts and ends where it should, every step is open, and it meets the way-points in order."""
    if not path:
        return Verdict(False, "empty")
    for index, cell in enumerate(path):
        if cell not in CELLS[: maze.size**2]:
            return Verdict(False, f"not a cell: {cell!r} at {index}")
    if path[0] != waypoints[0]:
        return Verdict(False, f"starts at {path[0]}, not {waypoints[0]}")
    cells = [CELLS.index(cell) for cell in path]
    for index, (a, b) in enumerate(zip(cells, cells[1:], strict=False)):
        if not maze.is_open(a, b):
            if a == b:
                return Verdict(False, f"stays on {CELLS[a]} at {index}")
            what = "wall" if _beside(min(a, b), max(a, b), maze.size) else "jump"
            return Verdict(False, f"{what} {CELLS[a]}-{CELLS[b]} at {index}")
    if path[-1] != waypoints[-1]:
        return Verdict(False, f"ends at {path[-1]}, not {waypoints[-1]}")
    rest = iter(path)
    if missed := next((waypoint for waypoint in waypoints if waypoint not in rest), None):
        return Verdict(False, f"misses way-point {missed} in its turn")
    return Verdict(True, None, len(path) == maze.path_length(waypoints))


def flexmdm_row(waypoints: str, maze: Maze) -> dict[str, Any]:
    """Way-points kept, each gap between two of them a hole, also where nothing is missing."""
    spans = [{"text": waypoints[0], "kept": True}]
    for segment, waypoint in zip(maze.segments(waypoints), waypoints[1:], strict=True):
        spans += [{"text": segment, "kept": False}, {"text": waypoint, "kept": True}]
    return {"spans": spans}


def mdm_row(waypoints: str, maze: Maze) -> dict[str, Any]:
    """Way-points as the prompt, the whole path as the answer."""
    return {
        "spans": [{"text": waypoints + PROMPT_END, "kept": True}, {"text": maze.path(waypoints), "kept": False}],
    }


def draw_waypoints(rng: random.Random, maze: Maze, level: str) -> str:
    """Distinct cells, drawn uniformly among the lists whose path has something to learn and fits the window."""
    while True:
        waypoints = "".join(rng.sample(CELLS[: maze.size**2], LEVELS[level] + 2))
        if len(waypoints) < maze.path_length(waypoints) <= LONGEST_PATH:
            return waypoints


def draw_problems(maze: Maze, *, seed: int, rows: int, num_eval: int) -> tuple[dict[str, list[str]], Iterator[str]]:
    """Way-point lists to be scored, by "eval-easy" and so on, all different; and `rows` others to train on, a third of
    each level (repeats allowed: there are only 42,840 easy ones)."""
    rng = random.Random(f"problems {seed}")
    scored: dict[str, list[str]] = {}
    taken: set[str] = set()
    for name in (f"{split}-{level}" for split in SPLITS for level in LEVELS):
        scored[name] = []
        while len(scored[name]) < num_eval:
            waypoints = draw_waypoints(rng, maze, name.split("-")[1])
            if waypoints not in taken:
                taken.add(waypoints)
                scored[name].append(waypoints)

    def training() -> Iterator[str]:
        levels = list(LEVELS)
        for row in range(rows):
            while (waypoints := draw_waypoints(rng, maze, levels[row % len(levels)])) in taken:
                pass
            yield waypoints

    return scored, training()


def write(out: Path, maze: Maze, *, seed: int, rows: int, num_eval: int) -> str:
    """Write all files of the task into a new or empty directory; returns a line about them.

    Raises ValueError when `out` holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory: choose another one")
    out.mkdir(parents=True, exist_ok=True)
    scored, training = draw_problems(maze, seed=seed, rows=rows, num_eval=num_eval)
    for name, problems in scored.items():
        _write_rows(out / f"{name}.jsonl", [{"waypoints": waypoints} for waypoints in problems])
    longest = 0
    with open(out / "flexmdm.jsonl", "w", newline="\n") as flexmdm, open(out / "mdm.jsonl", "w", newline="\n") as mdm:
        for waypoints in training:
            longest = max(longest, maze.path_length(waypoints))
            flexmdm.write(json.dumps(flexmdm_row(waypoints, maze)) + "\n")
            mdm.write(json.dumps(mdm_row(waypoints, maze)) + "\n")
    record = maze.to_dict() | {"window": WINDOW, "longest_path": longest, "data_seed": seed, "rows": rows}
    (out / "maze.json").write_text(json.dumps(record, indent=2) + "\n")
    medians = (
        f"{level} {statistics.median_high(maze.path_length(w) for w in scored[f'eval-{level}'])}" for level in LEVELS
    )
    return (
        f"{out}: {rows:,} training paths (longest {longest} cells), {num_eval} problems a level in eval and tune; "
        f"median path in eval: {', '.join(medians)} cells"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m retrofit.data.maze",
        description="Draw a maze and write the planning task: training rows and problems to score.",
        epilog="example: python -m retrofit.data.maze runs/demo/maze --seed 0 --rows 60000",
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="a new directory")
    parser.add_argument("--seed", type=int, default=0, help="of the maze and the problems (default 0)")
    parser.add_argument("--rows", type=int, default=60000, help="training rows (default 60000)")
    parser.add_argument("--eval", type=int, default=200, help="problems a level in eval and in tune (default 200)")
    parser.add_argument("--size", type=int, default=6, help="cells on a side (default 6)")
    parser.add_argument("--openings", type=int, default=12, help="walls taken out of the tree (default 12)")
    options = parser.parse_args(arguments)
    try:
        maze = Maze.draw(options.seed, options.size, options.openings)
        print(write(options.out, maze, seed=options.seed, rows=options.rows, num_eval=options.eval))
    except (ValueError, OSError) as error:
        parser.exit(2, f"retrofit: error: {error}\n")


def _beside(a: int, b: int, size: int) -> bool:
    """Whether cells a < b of a size x size grid share a side."""
    return b < size * size and (b - a == size or (b - a == 1 and b % size != 0))


def _write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
