"""The token store: documents as flat, memory-mapped arrays with a manifest that says what they are.

A data directory holds::

    manifest.json                               what it was made from, for which tokenizer; sizes and digests
    rejects.jsonl                               rows that were left out, each with its reason
    {train,held_out}/tokens.npy   uint32 [T]    the documents' tokens, one after the other
    {train,held_out}/offsets.npy  int64  [N+1]  document d is tokens[offsets[d] : offsets[d + 1]]
    {train,held_out}/flags.npy    uint8  [T+N]  n + 1 entries for a document of n tokens, from offsets[d] + d on:
                                                bit 0 of entry j: token j is kept; bit 1 of entry j: the gap before
                                                token j is open (entry n: the gap after the last token)

It is written under a temporary name and renamed when complete, so that a directory of that name is always whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, Literal, cast

import numpy as np
import torch
from torch import Tensor

FORMAT_VERSION = 1
KEPT, OPEN = 1, 2  # the bits of a flag
SPLITS = ("train", "held_out")
ARRAYS: dict[str, np.dtype] = {"tokens": np.dtype("<u4"), "flags": np.dtype("u1"), "offsets": np.dtype("<i8")}

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Documents:
    """A right-padded batch of B documents, the longest of L tokens.

    Attributes:
        tokens: [B, L] int64; zeros past the end of a document.
        lengths: [B] int64, in tokens.
        kept: [B, L] bool; True where a token is given (never deleted nor masked). False past the end.
        open_gaps: [B, L + 1] bool; entry j is the gap before token j, entry n the gap after the last. False past it.
    """

    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    open_gaps: Tensor


@dataclass(frozen=True)
class TokenizerRecord:
    """Which tokenizer made the tokens. `vocab_size` is the largest token id + 1, `last_token` the token that has it."""

    name_or_path: str
    revision: str | None
    digest: str
    vocab_size: int
    last_token: str
    mask_token_id: int | None
    pad_token_id: int | None
    eos_token_id: int | None


@dataclass(frozen=True)
class SourceRecord:
    """One input: its file name or data set id, SHA-256 of its contents, rows read."""

    name: str
    digest: str
    rows: int


@dataclass(frozen=True)
class SplitRecord:
    """One split. `digest`: SHA-256 over the bytes of tokens.npy, flags.npy and offsets.npy in this order."""

    documents: int
    tokens: int
    digest: str
    bytes: dict[str, int]
    longest: int
    median_length: int
    lengths: list[tuple[int, int]]  # histogram: (largest length of the bin, documents in it); bins end at powers of two
    mean_deletable_tokens: float
    mean_gap: float  # deletable tokens over holes, the gaps of a document with all deletable tokens taken out


@dataclass(frozen=True)
class Manifest:
    """What a data directory says of itself. Holds neither times nor paths: equal inputs give equal manifests."""

    tokenizer: TokenizerRecord
    template: str
    max_length: int
    held_out_fraction: float
    seed: int
    sources: list[SourceRecord]
    rows: int
    kept: int
    rejected: dict[str, int]
    splits: dict[str, SplitRecord]
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and through the splits' digests of the data itself."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def mean_deletable_tokens(self) -> float:
        """Mean number of tokens of a training document that are not kept."""
        return self.splits["train"].mean_deletable_tokens

    @property
    def mean_gap(self) -> float:
        """Mean number of training tokens in a hole."""
        return self.splits["train"].mean_gap

    def to_dict(self) -> dict[str, Any]:
        return cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(self))))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Manifest:
        """Raises KeyError or TypeError where a field is missing or unknown."""
        values = dict(values)
        values["tokenizer"] = TokenizerRecord(**values["tokenizer"])
        values["sources"] = [SourceRecord(**source) for source in values["sources"]]
        splits = {}
        for name, split in values["splits"].items():
            lengths = [(int(upper), int(count)) for upper, count in split["lengths"]]
            splits[name] = SplitRecord(**{**split, "lengths": lengths})
            for array in ARRAYS:
                int(split["bytes"][array])
        values["splits"] = splits
        return cls(**values)

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read `directory`/manifest.json. Raises ValueError when it is absent, broken or of another format."""
        path = directory / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{directory}: no manifest.json there: make a data directory with `retrofit preprocess`")
        try:
            values = json.loads(path.read_text("utf-8"))
            version = values["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest ({error}): run `retrofit preprocess` again") from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path}: format_version is {version!r}, expected {FORMAT_VERSION}: run `retrofit preprocess` again"
            )
        try:
            return cls.from_dict(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged manifest ({error}): run `retrofit preprocess` again") from error


@dataclass(frozen=True)
class TokenStore:
    """One split of a data directory, memory-mapped: nothing is read before it is asked for."""

    path: Path
    split: str
    manifest: Manifest
    tokens: np.ndarray = field(repr=False)
    flags: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, split: Split = "train") -> TokenStore:
        """Open a split. The files' sizes, types and shapes are checked; `verify` reads their contents too.

        Raises ValueError when the directory is not a store, or a file is missing, cut short or of another type.
        """
        path = Path(path)
        manifest = Manifest.read(path)
        if split not in manifest.splits:
            raise ValueError(f"{path}: no split {split!r}; it has {', '.join(sorted(manifest.splits))}")
        record = manifest.splits[split]
        arrays = {}
        for name, dtype in ARRAYS.items():
            file = path / split / f"{name}.npy"
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes[name]:
                found = "it is missing" if size is None else f"it has {size}"
                raise ValueError(
                    f"{file}: expected {record.bytes[name]} bytes, {found} (incomplete copy?): "
                    "copy the data directory again or run `retrofit preprocess` again"
                )
            arrays[name] = np.load(file, allow_pickle=False, mmap_mode="r")
            if arrays[name].dtype != dtype or arrays[name].ndim != 1:
                raise ValueError(f"{file}: expected one dimension of {dtype}, found {arrays[name].dtype}")
        documents, tokens = len(arrays["offsets"]) - 1, len(arrays["tokens"])
        if documents != record.documents or tokens != record.tokens or len(arrays["flags"]) != tokens + documents:
            raise ValueError(f"{path / split}: the arrays disagree with manifest.json: run `retrofit preprocess` again")
        return cls(path, split, manifest, **arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenStore.open, (self.path.absolute(), self.split)  # a pickled memmap would be all of its contents

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def record(self) -> SplitRecord:
        return self.manifest.splits[self.split]

    @property
    def longest(self) -> int:
        """Tokens of the longest document of all splits."""
        return max(record.longest for record in self.manifest.splits.values())

    @property
    def digest(self) -> str:
        """SHA-256 of the split's three files, as the manifest has it."""
        return self.record.digest

    def verify(self) -> None:
        """Read the whole split and compare its digest. Raises ValueError where the contents have changed."""
        if (digest := split_digest(self.path / self.split)) != self.record.digest:
            raise ValueError(
                f"{self.path / self.split}: contents changed since they were written (SHA-256 {digest[:12]}, "
                f"manifest.json says {self.record.digest[:12]}): copy the data directory again or prepare it again"
            )

    def kept(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[Tensor, Tensor]:
        """Of the documents at `indices` only what the lengths of x_t depend on.

        Returns:
            bool [T], where a token is given, document after document; int64 [B], the documents' lengths.

        Raises IndexError for an index outside 0..N-1.
        """
        chosen, starts, lengths = self._find(indices)
        flags = np.asarray(self.flags)  # slices of a memmap cost ten times those of a plain array
        pieces = [flags[s : s + n] for s, n in zip((starts + chosen).tolist(), lengths.tolist(), strict=True)]
        joined = np.concatenate(pieces) if pieces else flags[:0]
        return torch.from_numpy(joined & KEPT != 0), torch.from_numpy(lengths)

    def documents(self, indices: Sequence[int] | np.ndarray | Tensor) -> Documents:
        """The documents at `indices` (B of them, in this order, repeats allowed), right-padded.

        Raises IndexError for an index outside 0..N-1.
        """
        chosen, starts, lengths = self._find(indices)
        longest = int(lengths.max(initial=0))
        tokens = np.zeros((len(chosen), longest), dtype=np.int64)
        flags = np.zeros((len(chosen), longest + 1), dtype=np.uint8)
        all_tokens, all_flags = np.asarray(self.tokens), np.asarray(self.flags)
        places = zip(chosen.tolist(), starts.tolist(), lengths.tolist(), strict=True)
        for row, (index, start, length) in enumerate(places):
            tokens[row, :length] = all_tokens[start : start + length]
            flags[row, : length + 1] = all_flags[start + index : start + index + length + 1]
        return Documents(
            tokens=torch.from_numpy(tokens),
            lengths=torch.from_numpy(lengths),
            kept=torch.from_numpy(flags[:, :-1] & KEPT != 0),
            open_gaps=torch.from_numpy(flags & OPEN != 0),
        )

    def _find(self, indices: Sequence[int] | np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The indices as an array, and where each document starts and how many tokens it has, all int64 [B]."""
        chosen = np.asarray(indices, dtype=np.int64)
        if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise IndexError(f"document index outside 0..{len(self) - 1} in {self.path / self.split}")
        offsets = np.asarray(self.offsets)
        starts = offsets[chosen].astype(np.int64)
        return chosen, starts, offsets[chosen + 1] - starts

    def check_fits(self, config: Any, *, window: int | None = None) -> None:
        """Refuse a store that was made for another model.

        Args:
            config: anything with LLaDA's `vocab_size`, `mask_token_id`, `pad_token_id`, `max_sequence_length`.
            window: the recipe's window, in tokens, where there is one.

        Raises ValueError that names the field, both values and the mend.
        """
        tokenizer, again = self.manifest.tokenizer, "prepare the data with the tokenizer of this model"
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{self.path}: vocab_size: token {tokenizer.last_token!r} has id {tokenizer.vocab_size - 1}, "
                f"the model has {config.vocab_size} rows of embedding (ids 0 to {config.vocab_size - 1}): {again}"
            )
        for name in ("mask_token_id", "pad_token_id"):
            ours, theirs = getattr(tokenizer, name), getattr(config, name)
            if ours is not None and ours != theirs:
                raise ValueError(f"{self.path}: {name} is {ours} in the data, {theirs} in the model: {again}")
        longest = self.longest
        limits = {"max_sequence_length of the model": config.max_sequence_length, "window of the recipe": window}
        for name, limit in limits.items():
            if limit is not None and longest > limit:
                raise ValueError(
                    f"{self.path}: the longest document has {longest} tokens, the {name} is {limit}: "
                    f"raise it or prepare the data with --max-length {limit}"
                )

    def check_tokenizer(self, content: bytes | None) -> None:
        """Refuses a model whose tokenizer.json (its bytes; None: it has none) is not the one that made the data."""
        digest = None if content is None else hashlib.sha256(content).hexdigest()
        if digest not in (None, self.manifest.tokenizer.digest):
            raise ValueError(
                f"{self.path}: tokenizer.digest is {self.manifest.tokenizer.digest[:12]} in the data, "
                f"{str(digest)[:12]} in the model: prepare the data with the tokenizer of this model"
            )


def split_digest(directory: Path) -> str:
    """SHA-256 over the bytes of a split's three files."""
    digest = hashlib.sha256()
    for name in ARRAYS:
        with open(directory / f"{name}.npy", "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class ArrayWriter:
    """Writes a one-dimensional .npy file piece by piece, its length unknown until it is closed."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype, self.length = dtype, 0
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._header()
        self.start = self.file.tell()

    def _header(self) -> None:
        # numpy leaves room in the header for the first axis to grow, so that it can be written again in place.
        descr = np.lib.format.dtype_to_descr(self.dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (self.length,)}
        np.lib.format.write_array_header_1_0(self.file, header)

    def append(self, values: np.ndarray) -> None:
        self.file.write(values.astype(self.dtype, copy=False).tobytes())
        self.length += len(values)

    def close(self) -> None:
        self.file.seek(0)
        self._header()
        if self.file.tell() != self.start:
            raise RuntimeError("the .npy header grew: its room was too small")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class SplitWriter:
    """Writes one split document by document; holds counts, never the tokens."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self.directory = directory
        self.arrays = {name: ArrayWriter(directory / f"{name}.npy", dtype) for name, dtype in ARRAYS.items()}
        self.arrays["offsets"].append(np.zeros(1, dtype=np.int64))
        self.counts: dict[int, int] = {}  # documents by length
        self.tokens = self.deletable = self.holes = 0

    def append(self, token_ids: Sequence[int], kept: Sequence[bool], open_gaps: Sequence[bool]) -> None:
        """Append a document of n tokens, with n kept flags and n + 1 gap flags."""
        length = len(token_ids)
        if len(kept) != length or len(open_gaps) != length + 1:
            raise ValueError(f"{length} tokens need {length} kept and {length + 1} gap flags")
        kept_bits, open_bits = np.array([*kept, False], dtype=bool), np.array(open_gaps, dtype=bool)
        if not open_bits[:-1][~kept_bits[:-1]].all() or not open_bits[1:][~kept_bits[:-1]].all():
            raise ValueError("a gap beside a deletable token must be open")
        self.arrays["tokens"].append(np.asarray(token_ids, dtype=np.int64))
        self.arrays["flags"].append(kept_bits * np.uint8(KEPT) | open_bits * np.uint8(OPEN))
        self.tokens += length
        self.arrays["offsets"].append(np.array([self.tokens], dtype=np.int64))
        self.counts[length] = self.counts.get(length, 0) + 1
        self.deletable += length - sum(kept)
        # A hole is a maximal run of deletable tokens, or an open gap without any: count the open gaps that end one.
        self.holes += int((open_bits & np.append(kept_bits[:-1], True)).sum())

    def close(self) -> SplitRecord:
        for array in self.arrays.values():
            array.close()
        documents = sum(self.counts.values())
        return SplitRecord(
            documents=documents,
            tokens=self.tokens,
            digest=split_digest(self.directory),
            bytes={name: (self.directory / f"{name}.npy").stat().st_size for name in ARRAYS},
            longest=max(self.counts, default=0),
            median_length=_median(self.counts),
            lengths=_histogram(self.counts),
            mean_deletable_tokens=self.deletable / max(documents, 1),
            mean_gap=self.deletable / max(self.holes, 1),
        )


class StoreWriter:
    """A data directory in the making, under a temporary name; `commit` gives it its own, leaving the block drops it.

    Example::

        with StoreWriter(Path("data/gsm8k")) as writer:
            writer.splits["train"].append([1, 2, 3], [True, False, False], [False, True, True, True])
            writer.reject({"source": "a.jsonl", "line": 2, "reason": "bad JSON"})
            writer.commit(manifest_of(writer.close_splits()))
    """

    def __init__(self, out: Path, *, overwrite: bool = False) -> None:
        self.out, self.overwrite = out, overwrite
        check_destination(out, overwrite=overwrite)

    def __enter__(self) -> StoreWriter:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.temporary = self.out.parent / f".{self.out.name}.writing-{os.getpid()}"
        self.temporary.mkdir()
        self.splits = {split: SplitWriter(self.temporary / split) for split in SPLITS}
        self.rejects = open(self.temporary / "rejects.jsonl", "w", encoding="utf-8", newline="\n")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        arrays = [array for split in self.splits.values() for array in split.arrays.values()]
        files: list[IO[Any]] = [self.rejects, *(array.file for array in arrays)]
        for file in files:
            with suppress(OSError):  # on a full disk closing fails too, and the directory goes in any case
                file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def reject(self, row: dict[str, Any]) -> None:
        self.rejects.write(json.dumps(row) + "\n")

    def keep_rejects(self) -> Path:
        """Move the rejects beside the directory that will not be made, for a user who is refused; returns where."""
        self.rejects.close()
        path = self.out.parent / f"{self.out.name}.rejects.jsonl"
        os.replace(self.temporary / "rejects.jsonl", path)
        return path

    def close_splits(self) -> dict[str, SplitRecord]:
        return {name: split.close() for name, split in self.splits.items()}

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest, flush everything to disk, and give the directory its name."""
        with open(self.temporary / "manifest.json", "w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(manifest.to_dict(), indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rejects.flush()
        os.fsync(self.rejects.fileno())
        self.rejects.close()
        for directory in (*(self.temporary / split for split in SPLITS), self.temporary):
            _fsync_directory(directory)
        check_destination(self.out, overwrite=self.overwrite)
        with _set_aside(self.out):
            os.rename(self.temporary, self.out)
        _fsync_directory(self.out.parent)


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Refuse an output path that holds something: a data directory unless `overwrite`, anything else always."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "manifest.json").is_file():
        raise ValueError(f"{out} exists and is not a data directory: choose another output directory")
    if not overwrite:
        raise ValueError(f"{out} already holds prepared data: choose another output directory, or give --overwrite")


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Move what is at `path` out of the way; drop it when the block succeeds, put it back when it fails."""
    aside = path.parent / f".{path.name}.replaced-{os.getpid()}"
    if not path.exists():
        yield
        return
    os.rename(path, aside)
    try:
        yield
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside)


def _fsync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _median(counts: dict[int, int]) -> int:
    """The lower median of the lengths whose counts are given; 0 for none."""
    half, seen = sum(counts.values()) / 2, 0
    for length in sorted(counts):
        seen += counts[length]
        if seen >= half:
            return length
    return 0


def _histogram(counts: dict[int, int]) -> list[tuple[int, int]]:
    """Documents by length, in bins that end at powers of two; empty bins left out."""
    bins: dict[int, int] = {}
    for length, count in counts.items():
        upper = 1 << max(length - 1, 0).bit_length()
        bins[upper] = bins.get(upper, 0) + count
    return sorted(bins.items())
