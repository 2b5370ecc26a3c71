"""Pictures of the planning task: solved and failed mazes, and one path growing as it is sampled.

    python -m retrofit.viewing.maze RESULTS_DIR... --out DIR

reads what `retrofit evaluate --task maze --output RESULTS_DIR` wrote and makes, for each directory, NAME-mazes.png and
NAME-growing.png, and prints the growing path as text.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.data.maze import CELLS, END_SIGN, LEVELS, MASK_SIGN, PROMPT_END, Maze

# Okabe and Ito's colours, which the colour-blind can tell apart; solved and failed differ by mark and title too.
WALL, PATH, BAD, WAYPOINT, MASK = "#333333", "#0072B2", "#D55E00", "#F0E442", "#999999"
WALLS: dict[str, Any] = {"color": WALL, "linewidth": 2, "solid_capstyle": "round"}
STEP: dict[str, Any] = {"color": PATH, "linewidth": 3}
WRONG_STEP: dict[str, Any] = {"color": BAD, "linewidth": 2, "linestyle": (0, (2, 1.5))}
MISSING_STEPS: dict[str, Any] = {"color": MASK, "linewidth": 1.2, "linestyle": (0, (1, 2))}
LEGEND = "circles: way-points in their order, blue: open steps"
SOLVED_COLUMNS, FAILED_COLUMNS = 2, 2
FRAMES = 6


@dataclass(frozen=True)
class Results:
    """What an evaluation wrote: its rows, the frames of its traces by level, its settings and its maze."""

    name: str
    rows: list[dict[str, Any]]
    traces: dict[str, list[dict[str, Any]]]
    settings: dict[str, Any]
    maze: Maze

    @classmethod
    def read(cls, directory: Path) -> Results:
        """Raises ValueError when the directory holds no scores of the maze."""
        try:
            settings = json.loads((directory / "settings.json").read_text("utf-8"))
            rows, frames = _rows(directory / "results.jsonl"), _rows(directory / "trace.jsonl")
            maze = Maze.from_dict(settings["maze"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            mend = "make it with `retrofit evaluate CHECKPOINT --task maze --data DATA --output RESULTS_DIR`"
            raise ValueError(f"{directory}: no scores of the maze in there ({error}): {mend}") from error
        traces = {level: [frame for frame in frames if frame["level"] == level] for level in LEVELS}
        return cls(directory.resolve().name, rows, {k: v for k, v in traces.items() if v}, settings, maze)

    @property
    def title(self) -> str:
        kind = "FlexMDM" if self.settings["model_type"] == "flexmdm" else "MDM"
        levels = self.settings["summary"]["levels"]
        scores = ", ".join(f"{level} {100 * levels[level]['success']:.0f} %" for level in levels)
        return f"{kind}: solved {scores}"


def text_maze(maze: Maze, waypoints: str, path: str) -> str:
    """The maze in characters: way-points by number in their order, other cells of the path as a dot.

    Steps of the path between neighbours without a wall are drawn as lines, where the path takes them.
    """
    size, steps = maze.size, {frozenset(pair) for pair in _steps(path, maze) if maze.is_open(*pair)}
    visited = {CELLS.index(cell) for cell in path if cell in CELLS[: size**2]}
    lines = ["+" + "---+" * size]
    for row in range(size):
        cells, floor = "|", "+"
        for column in range(size):
            cell = row * size + column
            mark = (
                str(waypoints.index(CELLS[cell]) + 1) if CELLS[cell] in waypoints else "." if cell in visited else " "
            )
            left = "-" if frozenset((cell - 1, cell)) in steps and column > 0 else " "
            right = "-" if frozenset((cell, cell + 1)) in steps and column + 1 < size else " "
            below = "|" if frozenset((cell, cell + size)) in steps else " "
            cells += f"{left}{mark}{right}" + _wall_or(maze, cell, cell + 1, column + 1 < size, "|", right)
            floor += (f" {below} " if row + 1 < size and maze.is_open(cell, cell + size) else "---") + "+"
        lines += [cells, floor]
    return "\n".join(lines)


def draw_results(results: Results, file: Path) -> None:
    """A picture with a row a level: solved mazes on the left, failed ones on the right, each with its reason."""
    figure, axes = _figure(
        len(LEVELS),
        SOLVED_COLUMNS + FAILED_COLUMNS,
        results.title,
        f"{LEGEND}, dashed: wall or jump, cross: stands still",
    )
    for level, line in zip(LEVELS, axes, strict=True):
        rows = [row for row in results.rows if row["level"] == level]
        for wanted, columns in ((True, line[:SOLVED_COLUMNS]), (False, line[SOLVED_COLUMNS:])):
            chosen = [row for row in rows if row["solved"] is wanted][: len(columns)]
            for axis, row in zip(columns, [*chosen, *[None] * (len(columns) - len(chosen))], strict=True):
                if row is None:
                    axis.set_axis_off()
                    axis.text(0.5, 0.5, f"{level}:\nno more {'solved' if wanted else 'failed'}", **_CENTRED)
                    continue
                draw_maze(axis, results.maze, row["waypoints"], row["output"])
                axis.set_title(_caption(row), fontsize=9, color="black" if wanted else BAD, parse_math=False)
    _save(figure, file)


def draw_growing(results: Results, level: str, file: Path) -> None:
    """A picture of one path at `FRAMES` moments of its sampling, with its text (masks as "_") below."""
    frames = _spread(results.traces[level], FRAMES)
    waypoints = frames[0]["waypoints"]
    title = f"{results.title.split(':')[0]}: one path growing ({level})"
    figure, axes = _figure(2, FRAMES // 2, title, f'{LEGEND}, dotted and "_": still to be written')
    for axis, frame in zip(axes.flat, frames, strict=False):
        text = _written(frame["text"], waypoints)
        draw_maze(axis, results.maze, waypoints, text, finished=frame is frames[-1])
        axis.set_title(f"t = {frame['t']:.2f}", fontsize=10)
        axis.set_xlabel(_wrap(text, 26), family="monospace", fontsize=9, parse_math=False)
    for axis in axes.flat[len(frames) :]:
        axis.set_axis_off()
    _save(figure, file)


def draw_maze(axis: Any, maze: Maze, waypoints: str, path: str, *, finished: bool = True) -> None:
    """Draw walls, the path and the way-points (numbered in their order) into matplotlib axes.

    Steps that are open are solid, steps through walls or across the maze dashed in another colour; where the path is
    not `finished` these are gaps still to be filled, dotted in grey. A way that is gone twice is drawn beside itself;
    where the path stands still there is a cross.
    """
    size = maze.size
    for cell in range(size * size):
        row, column = divmod(cell, size)
        axis.text(column + 0.07, row + 0.1, CELLS[cell], fontsize=6, color=MASK, ha="left", va="top", zorder=1)
        if column + 1 < size and not maze.is_open(cell, cell + 1):
            axis.plot([column + 1, column + 1], [row, row + 1], **WALLS)
        if row + 1 < size and not maze.is_open(cell, cell + size):
            axis.plot([column, column + 1], [row + 1, row + 1], **WALLS)
    axis.plot([0, size, size, 0, 0], [0, 0, size, size, 0], color=WALL, linewidth=2.5)
    taken: dict[frozenset[int], int] = {}
    for a, b in _steps(path, maze):
        is_open = maze.is_open(a, b)
        times = taken.get(frozenset((a, b)), -1) + 1
        taken[frozenset((a, b))] = times
        shift = 0.14 * ((times + 1) // 2) * (1 if times % 2 else -1)
        dx, dy = (0.0, shift) if abs(a - b) == 1 else (shift, 0.0)
        (x, y), (to_x, to_y) = _centre(a, size), _centre(b, size)
        line = STEP if is_open else WRONG_STEP if finished else MISSING_STEPS
        axis.plot([x + dx, to_x + dx], [y + dy, to_y + dy], zorder=2, **line)
    for a, b in [] if finished else _holes(path, maze):
        (x, y), (to_x, to_y) = _centre(a, size), _centre(b, size)
        axis.plot([x, to_x], [y, to_y], zorder=2, **MISSING_STEPS)
    for cell in {CELLS.index(cell) for cell in path if cell in CELLS[: size**2]}:
        axis.plot(*_centre(cell, size), "o", color=PATH, markersize=5, zorder=3)
    for mark, following in zip(path, path[1:], strict=False):
        if finished and mark == following and mark in CELLS[: size**2]:
            axis.plot(*_centre(CELLS.index(mark), size), "x", color=BAD, markersize=20, markeredgewidth=2, zorder=6)
    for number, waypoint in enumerate(waypoints, start=1):
        x, y = _centre(CELLS.index(waypoint), size)
        axis.plot(x, y, "o", color=WAYPOINT, markeredgecolor="black", markersize=13, zorder=4)
        axis.text(x, y + 0.02, str(number), fontsize=9, zorder=5, ha="center", va="center")
    axis.set(xlim=(-0.1, size + 0.1), ylim=(size + 0.1, -0.1), aspect="equal", xticks=[], yticks=[])
    axis.set_frame_on(False)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m retrofit.viewing.maze",
        description="Pictures of solved and failed mazes and of one path growing.",
        epilog="example: python -m retrofit.viewing.maze runs/demo/flexmdm-scores --out runs/demo/pictures",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS_DIR", help="what evaluate --output wrote")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the pictures go")
    options = parser.parse_args(arguments)
    try:
        every = [Results.read(directory) for directory in options.results]
        options.out.mkdir(parents=True, exist_ok=True)
        for results in every:
            pictures = [options.out / f"{results.name}-mazes.png"]
            draw_results(results, pictures[0])
            print(results.title)
            if level := _most_telling(results):
                pictures.append(options.out / f"{results.name}-growing.png")
                draw_growing(results, level, pictures[-1])
                print(text_growing(results, level))
            print(*pictures, sep="\n")
        print(comparison(every))
    except (ValueError, OSError) as error:
        parser.exit(2, f"retrofit: error: {error}\n")


def comparison(every: Sequence[Results]) -> str:
    """A table of all evaluations: a row each, forward passes, success with its 95 % interval for every level."""
    width = max(len(results.name) for results in every) + 2
    lines = ["", " " * width + "forwards" + "".join(f"{level:>18}" for level in LEVELS)]
    for results in every:
        levels = results.settings["summary"]["levels"].values()
        forwards = sum(level["forwards"] for level in levels) / len(levels)
        cells = []
        for level in LEVELS:
            summary = results.settings["summary"]["levels"][level]
            low, high = (100 * end for end in summary["interval"])
            cells.append(f"{100 * summary['success']:.1f} % ({low:.0f}-{high:.0f})".rjust(18))
        lines.append(f"{results.name:<{width}}{forwards:>8.0f}" + "".join(cells))
    return "\n".join(lines)


def text_growing(results: Results, level: str) -> str:
    """The text of one path at some moments of its sampling, then the finished path in its maze."""
    frames = _spread(results.traces[level], FRAMES)
    waypoints = frames[0]["waypoints"]
    lines = [f"t = {frame['t']:.2f}  {_written(frame['text'], waypoints)}" for frame in frames]
    return "\n".join([*lines, text_maze(results.maze, waypoints, _written(frames[-1]["text"], waypoints))])


def _most_telling(results: Results) -> str | None:
    """Medium if a solved path of it was followed, else the first level with one, else any."""
    solved = {row["waypoints"] for row in results.rows if row["solved"]}
    levels = [level for level in ("medium", "easy", "hard") if level in results.traces]
    good = [level for level in levels if results.traces[level][0]["waypoints"] in solved]
    return next(iter(good or levels), None)


def _written(text: str, waypoints: str) -> str:
    """The path in a frame's text: an MDM's prompt and end tokens taken off, what does not print as "?"."""
    return _printable(text.removeprefix(waypoints + PROMPT_END).rstrip(END_SIGN))


def _printable(text: str) -> str:
    return "".join(character if " " <= character <= "~" else "?" for character in text)


def _caption(row: dict[str, Any]) -> str:
    if row["solved"]:
        return f"{row['level']}: solved, {len(row['output'])} cells" + (" (shortest)" if row["shortest"] else "")
    return f"{row['level']}: failed\n{_printable(row['reason'])}"


def _steps(path: str, maze: Maze) -> list[tuple[int, int]]:
    """Pairs of cells that follow each other in the text, with nothing (no mask) between them."""
    known = CELLS[: maze.size**2]
    pairs = zip(path, path[1:], strict=False)
    return [(known.index(a), known.index(b)) for a, b in pairs if a in known and b in known and a != b]


def _holes(path: str, maze: Maze) -> list[tuple[int, int]]:
    """Pairs of different cells with only masks between them."""
    known = CELLS[: maze.size**2]
    runs = re.findall(f"(?=([{known}]){MASK_SIGN}+([{known}]))", path)
    return [(known.index(a), known.index(b)) for a, b in runs if a != b]


def _centre(cell: int, size: int) -> tuple[float, float]:
    return cell % size + 0.5, cell // size + 0.5


def _wall_or(maze: Maze, a: int, b: int, inside: bool, wall: str, passage: str) -> str:
    return passage if inside and maze.is_open(a, b) else wall


def _spread(frames: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """`count` frames, evenly apart, the first and the last among them; all where there are fewer."""
    if len(frames) <= count:
        return frames
    return [frames[round(i * (len(frames) - 1) / (count - 1))] for i in range(count)]


def _wrap(text: str, width: int) -> str:
    return "\n".join(text[i : i + width] for i in range(0, len(text), width))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


_CENTRED: dict[str, Any] = {"ha": "center", "va": "center", "color": MASK}


def _figure(rows: int, columns: int, title: str, legend: str) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    size = (2.8 * columns, 3.25 * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(title, fontsize=13)
    figure.supxlabel(legend, fontsize=9, color=WALL)
    return figure, axes


def _save(figure: Any, file: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(file, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
