"""Where rows come from: local JSONL, local text, or a data set id. One row at a time, broken ones as errors.

Text is UTF-8. A byte-order mark at the start and Windows line ends are tolerated; blank lines are neither rows nor
errors; the last line needs no newline. A `.txt` file holds one document a block, blocks parted by blank lines.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
TEXT_SUFFIXES = (".txt",)


class RowError(ValueError):
    """Why one row cannot be used. Caught and counted by `preprocess`, never raised to the user.

    Attributes:
        kind: a few fixed words to count by, such as "wrong type".
        details: what else belongs in the rejects file: `field`, `expected`, `found`, `tokens`.
    """

    def __init__(self, kind: str, reason: str, **details: Any) -> None:
        super().__init__(reason)
        self.kind, self.details = kind, details


@dataclass(frozen=True)
class Row:
    """One row of a source. `line` counts from 1 (rows, for a data set); `value` is the row, or why there is none."""

    source: str
    line: int
    value: dict[str, Any] | RowError


class Source(Protocol):
    """Rows to read once. `digest` (SHA-256 of the contents) is complete when the last row has been read."""

    name: str

    def __iter__(self) -> Iterator[Row]: ...

    @property
    def digest(self) -> str: ...


def open_source(source: str, *, config: str | None = None, split: str = "train") -> Source:
    """Find out what `source` is; reads nothing yet.

    Args:
        source: path of a .jsonl, .ndjson, .json (a row a line) or .txt file; otherwise a data set id, or a local
            directory, for `datasets.load_dataset`.
        config: the data set's configuration ("main" for openai/gsm8k).
        split: the data set's split.

    Raises ValueError for a file that is missing or of an unknown kind.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in JSON_SUFFIXES + TEXT_SUFFIXES and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"{source}: no such file")
        return TextFile(source) if suffix in TEXT_SUFFIXES else JsonLines(source)
    if path.is_file():
        known = ", ".join(JSON_SUFFIXES + TEXT_SUFFIXES)
        raise ValueError(f"{source}: unknown kind of file {suffix!r}: give one of {known}, or a data set id")
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise ValueError(f"{source}: no such file or directory")
    return DataSet(source, config, split)


class _LocalFile:
    """The lines of a local file, and the SHA-256 of its bytes."""

    def __init__(self, source: str) -> None:
        self.source, self.name = source, Path(source).name
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def _lines(self) -> Iterator[tuple[int, str | RowError]]:
        """Line number and text without its line end. Lines end at newlines alone, so U+2028 inside a string is text."""
        with open(self.source, "rb") as file:
            for number, line in enumerate(file, start=1):
                self._hash.update(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                try:
                    yield number, line.rstrip(b"\r\n").decode("utf-8")
                except UnicodeDecodeError as error:
                    reason = f"byte {error.start + 1} of the line is not UTF-8 ({error.reason})"
                    yield number, RowError("invalid UTF-8", reason)


class JsonLines(_LocalFile):
    """One JSON object a line."""

    def __iter__(self) -> Iterator[Row]:
        for number, line in self._lines():
            if isinstance(line, RowError):
                yield Row(self.source, number, line)
            elif line.strip():
                yield Row(self.source, number, _parse(line))


class TextFile(_LocalFile):
    """One document a block of lines between blank lines, as rows {"text": block} numbered by their first line."""

    def __iter__(self) -> Iterator[Row]:
        block: list[str] = []
        start, error = 0, None
        for number, line in _then_blank(self._lines()):
            if isinstance(line, RowError):
                error = error or line
            elif line.strip():
                block.append(line)
            else:
                if block or error:
                    yield Row(self.source, start, error or {"text": "\n".join(block)})
                block, start, error = [], 0, None
                continue
            start = start or number


class DataSet:
    """A data set that `datasets` loads, streamed. `digest` is that of its rows, as JSON with sorted keys."""

    def __init__(self, source: str, config: str | None, split: str) -> None:
        self.source, self.config, self.split = source, config, split
        self.name = Path(source).name if Path(source).is_dir() else source
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def __iter__(self) -> Iterator[Row]:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{self.source}: reading a data set needs `pip install datasets`") from error
        try:
            rows: Iterable[Any] = datasets.load_dataset(self.source, self.config, split=self.split, streaming=True)
        except Exception as error:  # the library raises a dozen kinds: not found, gated, no such split, no network
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.source}: cannot load this data set, configuration {self.config}, split {self.split} "
                f"({reason}); a local .jsonl file does as well"
            ) from error
        for number, row in enumerate(rows, start=1):
            self._hash.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
            yield Row(self.source, number, dict(row))


def json_type(value: Any) -> str:
    """What JSON calls the type of a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _parse(line: str) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        return RowError("bad JSON", f"bad JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of too many digits
        return RowError("bad JSON", f"bad JSON: {error}")
    if not isinstance(value, dict):
        found = json_type(value)
        return RowError("wrong type", f"expected an object, found {found}", expected="object", found=found)
    return value


def _then_blank(lines: Iterator[tuple[int, str | RowError]]) -> Iterator[tuple[int, str | RowError]]:
    """The lines and one blank line more, which ends the last block."""
    yield from lines
    yield 0, ""
