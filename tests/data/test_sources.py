"""What counts as a row: line ends, marks, blank lines, and broken rows with their reasons."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from retrofit.data.sources import RowError, open_source


def rows(path: Path):
    return [(row.line, row.value) for row in open_source(str(path))]


def test_a_windows_file_has_the_rows_of_a_plain_one(tmp_path: Path) -> None:
    windows, plain = tmp_path / "w.jsonl", tmp_path / "p.jsonl"
    windows.write_bytes(b'\xef\xbb\xbf{"text":"a b"}\r\n\r\n{"text":"c"}')
    plain.write_bytes(b'{"text":"a b"}\n{"text":"c"}\n')
    assert [value for _, value in rows(windows)] == [value for _, value in rows(plain)]
    assert rows(windows) == [(1, {"text": "a b"}), (3, {"text": "c"})]


def test_a_line_separator_inside_a_string_is_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False) + "\n", "utf-8")
    assert rows(path) == [(1, {"text": "a\u2028b\x85c"})]


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b'{"text": ', "bad JSON", "bad JSON: Expecting value at column 10"),
        (b"{'text': 1}", "bad JSON", "column 2"),
        (b'{"text": "\xff"}', "invalid UTF-8", "byte 11 of the line is not UTF-8"),
        (b"[1]", "wrong type", "expected an object, found array"),
        (b"null", "wrong type", "expected an object, found null"),
        (b"[" * 100_000, "bad JSON", "bad JSON"),
    ],
)
def test_a_broken_line_is_an_error_with_its_number_and_the_others_go_on(tmp_path, line, kind, reason) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text":"a"}\n' + line + b'\n{"text":"b"}\n')
    (_, first), (number, error), (_, last) = rows(path)
    assert first == {"text": "a"} and last == {"text": "b"}
    assert number == 2 and isinstance(error, RowError) and error.kind == kind and reason in str(error)


def test_a_text_file_has_a_document_for_every_block_between_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\n  one\r\n two\r\n \t\r\n\r\nthree")
    assert rows(path) == [(2, {"text": "  one\n two"}), (6, {"text": "three"})]


def test_a_text_block_with_a_bad_byte_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nbad\n\xff\nblock\n\ngood")
    found = rows(path)
    assert [line for line, _ in found] == [1, 3, 7] and isinstance(found[1][1], RowError)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b'\xef\xbb\xbf{"text":"a"}\r\n\n'), ("a.txt", b"a\r\n\r\nb")):
        path = tmp_path / name
        path.write_bytes(content)
        source = open_source(str(path))
        list(source)
        assert source.digest == hashlib.sha256(content).hexdigest() and source.name == name


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.txt", "a/b/c", "./absent", "/absent"])
def test_a_missing_file_is_refused_before_anything_is_read(name: str) -> None:
    with pytest.raises(ValueError, match="no such file"):
        open_source(name)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(ValueError, match="unknown kind of file '.csv'"):
        open_source(str(tmp_path / "a.csv"))


def test_a_data_set_gives_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "toyset"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    source = open_source(str(folder), split="train")
    assert [(row.line, row.value) for row in source] == [(1, {"text": "a"}), (2, {"text": "b"})]
    assert source.name == "toyset" and len(source.digest) == 64


def test_a_data_set_that_does_not_load_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ValueError, match="cannot load this data set") as refusal:
        list(open_source(str(folder)))
    assert "\n" not in str(refusal.value)
