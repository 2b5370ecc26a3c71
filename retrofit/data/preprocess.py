"""`retrofit preprocess`: rows in, a token store out, and an account of what was left out.

Rows are streamed: memory holds one row and a few counts, however large the sources. Which split a document goes to is
decided by a hash of its tokens, so adding, removing or reordering other rows never moves it, and equal documents (one
program with its hole in different places, say) are never parted.
"""

from __future__ import annotations

import hashlib
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retrofit.data.sources import Row, RowError, Source, open_source
from retrofit.data.templates import END_HEADER, END_TURN, START, START_HEADER, TEMPLATES, Document, Encoder, apply

MASK_TOKEN = "<|mdm_mask|>"  # LLaDA-8B-Base's tokenizer has it in its vocabulary but not as `mask_token`


def preprocess(
    sources: list[str],
    out: Path,
    *,
    tokenizer: str,
    template: str,
    max_length: int,
    held_out: float = 0.01,
    max_rejected: float = 0.1,
    seed: int = 0,
    revision: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    overwrite: bool = False,
) -> None:
    """Prepare `sources` as a data directory at `out`, and print what became of the rows.

    Args:
        sources: local .jsonl or .txt files, or data set ids; see `retrofit.data.sources`.
        out: the data directory to write; see `retrofit.data.store` for what is in it.
        tokenizer: directory or Hub id with tokenizer.json; a config.json beside it gives the size of the embedding.
        template: a name in `retrofit.data.templates.TEMPLATES`.
        max_length: tokens a document may have. A longer text is split (template `text`), any other row rejected.
        held_out: the fraction of documents that go to the split `held_out`.
        max_rejected: the fraction of rows that may be rejected; above it nothing is written but the rejects.
        seed: another seed draws another held-out split.
        revision: of the tokenizer, on the Hub.
        dataset_config, dataset_split: where a source is a data set id.
        overwrite: replace a data directory at `out`.

    Raises ValueError, before anything is written, for a bad argument, source or tokenizer; and, leaving only
    `OUT.rejects.jsonl`, when no row or too few rows can be used.
    """
    from retrofit.data.store import Manifest, SourceRecord, StoreWriter

    _check_arguments(template, max_length, held_out, max_rejected)
    opened = [open_source(source, config=dataset_config, split=dataset_split) for source in sources]
    if not opened:
        raise ValueError("no sources: name at least one .jsonl or .txt file, or a data set id")
    store = StoreWriter(Path(out), overwrite=overwrite)
    loaded, record, forbidden = load_tokenizer(tokenizer, revision)
    if template in ("chat", "gsm8k"):
        _require_chat_tokens(loaded, tokenizer)
    encoder, tally, progress, records = Encoder(loaded, forbidden), Tally(), Progress(), []
    with store as writer:
        for source in opened:
            before = tally.rows
            for row in source:
                progress(tally)
                try:
                    documents = _documents(row, template, encoder, max_length)
                except RowError as error:
                    tally.reject(error)
                    rejected = {"source": row.source, "line": row.line, "kind": error.kind, "reason": str(error)}
                    writer.reject(rejected | error.details)
                    continue
                tally.keep(row)
                for document in documents:
                    split = "held_out" if _position(document.token_ids, seed) < held_out else "train"
                    writer.splits[split].append(document.token_ids, document.kept, document.open_gaps)
            records.append(SourceRecord(source.name, source.digest, tally.rows - before))
        progress.clear()
        _refuse_if_too_few(tally, max_rejected, opened, writer)
        splits = writer.close_splits()
        if not splits["train"].documents:
            raise ValueError("every document went to the held-out split: lower --held-out or bring more rows")
        manifest = Manifest(
            tokenizer=record,
            template=template,
            max_length=max_length,
            held_out_fraction=held_out,
            seed=seed,
            sources=records,
            rows=tally.rows,
            kept=tally.kept,
            rejected=dict(sorted(tally.rejected.items())),
            splits=splits,
        )
        writer.commit(manifest)
    print(summary(manifest, Path(out)))


def load_tokenizer(name: str, revision: str | None = None) -> tuple[Any, Any, dict[int, str]]:
    """A tokenizer, the record of it for the manifest, and its special tokens by id.

    Raises ValueError when there is none at `name`, or when it has ids beyond the embedding of the model beside it.
    """
    from transformers import AutoTokenizer, PreTrainedConfig
    from transformers.utils import cached_file

    from retrofit.data.store import TokenizerRecord

    try:
        # An empty config, since transformers would warn of the model type `llada`; the tokenizer needs none.
        empty = PreTrainedConfig()
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False, config=empty)
        file = cached_file(name, "tokenizer.json", revision=revision)
    except Exception as error:  # anything from a missing file to a refused connection; all mean the same to the user
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: cannot load a tokenizer from there ({reason[:300]})") from error
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except OSError:  # a tokenizer by itself
        config = {}
    vocabulary = tokenizer.get_vocab()
    last_token = max(vocabulary, key=lambda token: vocabulary[token])
    rows = config.get("embedding_size") or config.get("vocab_size")
    if rows is not None and vocabulary[last_token] >= rows:
        raise ValueError(
            f"{name}: token {last_token!r} has id {vocabulary[last_token]}, the model beside it has {rows} rows of "
            f"embedding (ids 0 to {rows - 1}): resize the model or take the token out of tokenizer.json"
        )
    mask_token_id = config.get("mask_token_id", tokenizer.mask_token_id)
    record = TokenizerRecord(
        name_or_path=name if not Path(name).exists() else Path(name).resolve().name,
        revision=revision,
        digest=hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        vocab_size=vocabulary[last_token] + 1,
        last_token=last_token,
        mask_token_id=vocabulary.get(MASK_TOKEN) if mask_token_id is None else mask_token_id,
        pad_token_id=config.get("pad_token_id", tokenizer.pad_token_id),
        eos_token_id=config.get("eos_token_id", tokenizer.eos_token_id),
    )
    return tokenizer, record, _special_tokens(tokenizer, record)


@dataclass
class Tally:
    """What became of the rows so far."""

    rows: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # one example of each kind of reject

    def keep(self, row: Row) -> None:
        self.rows += 1
        self.kept += 1

    def reject(self, error: RowError) -> None:
        self.rows += 1
        self.rejected[error.kind] += 1
        self.first.setdefault(error.kind, str(error))

    @property
    def num_rejected(self) -> int:
        return self.rejected.total()

    def reasons(self) -> str:
        return "; ".join(f"{count:,} {kind} ({self.first[kind]})" for kind, count in self.rejected.most_common())


class Progress:
    """A line on the terminal, rewritten twice a second; silent where stderr is a file."""

    def __init__(self) -> None:
        self.shown, self.start, self.last = sys.stderr.isatty(), time.monotonic(), 0.0

    def __call__(self, tally: Tally) -> None:
        if not self.shown or (now := time.monotonic()) - self.last < 0.5:
            return
        rate = tally.rows / max(now - self.start, 1e-9)
        line = f"{tally.rows:,} rows, {tally.num_rejected:,} rejected, {rate:,.0f} rows/s"
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        self.last = now

    def clear(self) -> None:
        if self.shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summary(manifest: Any, out: Path) -> str:
    """The account that is printed at the end; `manifest` is the store's."""
    rejected = sum(manifest.rejected.values())
    lines = [f"rows      {manifest.rows:,} read = {manifest.kept:,} kept + {rejected:,} rejected"]
    lines += [f"          {count:,} {kind}" for kind, count in sorted(manifest.rejected.items(), key=lambda x: -x[1])]
    for name, split in manifest.splits.items():
        lines.append(
            f"{name:<9} {split.documents:,} documents, {split.tokens:,} tokens, "
            f"median length {split.median_length}, longest {split.longest}"
        )
    if manifest.held_out_fraction and not manifest.splits["held_out"].documents:
        lines.append("          no document fell to held_out: raise --held-out for a held-out loss")
    bins = ", ".join(f"<={upper}: {count:,}" for upper, count in manifest.splits["train"].lengths)
    lines.append(f"lengths   {bins}")
    lines.append(f"to learn  {manifest.mean_deletable_tokens:.1f} tokens a document, {manifest.mean_gap:.1f} a hole")
    lines.append(f"written   {out}" + (f" (rejected rows: {out / 'rejects.jsonl'})" if rejected else ""))
    return "\n".join(lines)


def _documents(row: Row, template: str, encoder: Encoder, max_length: int) -> Sequence[Document]:
    if isinstance(row.value, RowError):
        raise row.value
    return apply(template, row.value, encoder, max_length)


def _position(token_ids: Sequence[int], seed: int) -> float:
    """Where a document falls in [0, 1): the first 53 bits of SHA-256 over the seed and the tokens."""
    content = struct.pack(f"<q{len(token_ids)}I", seed, *token_ids)
    return (int.from_bytes(hashlib.sha256(content).digest()[:8], "big") >> 11) / 2**53


def _special_tokens(tokenizer: Any, record: Any) -> dict[int, str]:
    """The tokens that content may not hold, by id: those that are special to the tokenizer or to the chat form."""
    special = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {tokenizer.convert_tokens_to_ids(token): token for token in tokenizer.all_special_tokens}
    vocabulary = tokenizer.get_vocab()
    names = (MASK_TOKEN, START, START_HEADER, END_HEADER, END_TURN)
    special |= {vocabulary[token]: token for token in names if token in vocabulary}
    for index in (record.mask_token_id, record.pad_token_id, record.eos_token_id):
        if index is not None and index not in special:
            special[index] = tokenizer.convert_ids_to_tokens(index) or f"of id {index}"
    return special


def _require_chat_tokens(tokenizer: Any, name: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if missing := [token for token in (START, START_HEADER, END_HEADER, END_TURN) if token not in vocabulary]:
        raise ValueError(f"{name}: the tokenizer has no {', '.join(missing)}, which the chat form needs")


def _check_arguments(template: str, max_length: int, held_out: float, max_rejected: float) -> None:
    if template not in TEMPLATES:
        raise ValueError(f"--template {template}: unknown, choose one of {', '.join(TEMPLATES)}")
    if max_length < 1:
        raise ValueError(f"--max-length {max_length}: must be at least 1 token")
    if not 0 <= held_out < 1:
        raise ValueError(f"--held-out {held_out}: a fraction of the documents, at least 0 and less than 1")
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"--max-rejected {max_rejected}: a fraction of the rows, from 0 to 1")


def _refuse_if_too_few(tally: Tally, max_rejected: float, sources: Sequence[Source], writer: Any) -> None:
    if not tally.rows:
        raise ValueError(f"{', '.join(source.name for source in sources)}: no rows in there")
    if tally.kept and tally.num_rejected <= max_rejected * tally.rows:
        return
    path = writer.keep_rejects()
    limit = f"more than --max-rejected {max_rejected:g} allows" if tally.kept else "none is left"
    mend = "mend the rows or choose another template" + (", or raise --max-rejected" if tally.kept else "")
    raise ValueError(
        f"{tally.num_rejected:,} of {tally.rows:,} rows rejected, {limit}: {tally.reasons()}; each is in {path}: {mend}"
    )
