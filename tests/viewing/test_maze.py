"""Pictures and text of the maze: made from what evaluation writes, whatever the model wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from retrofit.data.maze import LEVELS, Maze
from retrofit.viewing.maze import Results, comparison, main, text_growing, text_maze

MAZE = Maze.draw(0)
RING = Maze(3, 0, 0, frozenset({(1, 2), (2, 5), (5, 8), (7, 8), (6, 7), (3, 6), (0, 3), (1, 4)}))


def write_results(path: Path, *, outputs: dict[str, list[tuple[str, str, str | None]]], model_type="flexmdm") -> Path:
    """outputs: by level (way-points, output, reason)."""
    path.mkdir()
    rows = [
        {"level": level, "waypoints": w, "output": text, "solved": reason is None, "reason": reason, "shortest": True}
        for level, items in outputs.items()
        for w, text, reason in items
    ]
    frames = []
    for level, ((waypoints, text, _), *_) in outputs.items():
        texts = [waypoints, text[:1] + "_" * len(text), text]
        frames += [
            {"level": level, "waypoints": waypoints, "frame": i, "t": i / 2, "text": t} for i, t in enumerate(texts)
        ]
    summary = {"levels": {level: {"success": 0.5, "interval": [0.4, 0.6], "forwards": 9.0} for level in LEVELS}}
    settings = {"model_type": model_type, "maze": MAZE.to_dict(), "summary": summary}
    (path / "settings.json").write_text(json.dumps(settings))
    for name, content in (("results.jsonl", rows), ("trace.jsonl", frames)):
        (path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def good(waypoints: str) -> tuple[str, str, None]:
    return waypoints, MAZE.path(waypoints), None


def test_the_text_form_shows_walls_way_points_in_order_and_the_path() -> None:
    assert text_maze(RING, "15", "125") == "\n".join(
        [
            "+---+---+---+",
            "|   | 1---. |",
            "+   +   + | +",
            "|   |   | 2 |",
            "+   +---+   +",
            "|           |",
            "+---+---+---+",
        ]
    )


def test_the_text_form_bears_any_output() -> None:
    for output in ("", "?", "_1__5_", "15", "1\u2028\n", "é" * 99):
        assert len(text_maze(RING, "15", output).splitlines()) == 7


def test_pictures_are_made_whatever_was_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    failed = ("09Z", "0_?\u20289$\\Z$\u0000", "not a cell: '\u2028' at 1")
    first = write_results(
        tmp_path / "one",
        outputs={"easy": [good("09Z"), failed], "medium": [good("05ZUM")], "hard": [("0123456", "", "empty")]},
    )
    main([str(first), "--out", str(tmp_path / "pictures")])
    names = {f"one-{what}.png" for what in ("mazes", "growing")}
    assert {file.name for file in (tmp_path / "pictures").iterdir()} == names
    for name in names:
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert picture.width > 600 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 20
    out = capsys.readouterr().out
    assert "FlexMDM: solved easy 50 %" in out and MAZE.path("05ZUM") in out


def test_an_mdm_is_titled_as_one_and_its_prompt_and_ends_are_no_path(tmp_path: Path) -> None:
    failed = ("09Z", "09Z:09_Z..", "jump 0-9 at 0")
    results = Results.read(write_results(tmp_path / "mdm", outputs={"easy": [failed]}, model_type="llada"))
    assert results.title.startswith("MDM: ")
    assert text_growing(results, "easy").splitlines()[2] == "t = 1.00  09_Z"


def test_a_directory_without_scores_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="no scores of the maze in there"):
        Results.read(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--out", str(tmp_path / "pictures")])
    assert stop.value.code == 2 and not (tmp_path / "pictures").exists()
    assert "retrofit: error:" in capsys.readouterr().err


def test_the_table_compares_all_evaluations(tmp_path: Path) -> None:
    every = [
        Results.read(write_results(tmp_path / name, outputs={level: [good("09Z")] for level in LEVELS}))
        for name in ("one", "other")
    ]
    _, header, one, other = comparison(every).splitlines()
    assert header.split() == ["forwards", *LEVELS]
    assert one.split() == ["one", "9"] + ["50.0", "%", "(40-60)"] * 3 and other.startswith("other")
