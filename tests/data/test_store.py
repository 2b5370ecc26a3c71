"""What the token store promises: documents come back as they went in, whole or not at all, and it knows its model."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrofit.data.store import Manifest, SourceRecord, StoreWriter, TokenizerRecord, TokenStore, check_destination

DOCUMENTS = [
    ([7, 8, 9], [True, False, False], [False, True, True, True]),
    ([5], [False], [True, True]),
    ([1, 2], [True, True], [False, True, False]),  # an empty hole
    ([3, 4, 5, 6], [True, False, True, False], [False, True, True, True, True]),
]


def manifest(splits, **changes) -> Manifest:
    tokenizer = TokenizerRecord("toy", None, "0" * 64, 262, "<|eot_id|>", 258, 257, 257)
    sources = [SourceRecord("a.jsonl", "1" * 64, 5)]
    values = {"held_out_fraction": 0.0, "seed": 0, "rows": 5, "kept": 4, "rejected": {"bad JSON": 1}}
    return Manifest(
        tokenizer=tokenizer, template="spans", max_length=16, sources=sources, splits=splits, **{**values, **changes}
    )


def write(out: Path, documents=DOCUMENTS, *, overwrite: bool = False) -> Path:
    with StoreWriter(out, overwrite=overwrite) as writer:
        for document in documents:
            writer.splits["train"].append(*document)
        writer.reject({"source": "a.jsonl", "line": 2, "reason": "bad JSON"})
        writer.commit(manifest(writer.close_splits()))
    return out


def read(store: TokenStore, indices) -> list[tuple[list[int], list[bool], list[bool]]]:
    batch = store.documents(indices)
    return [
        (batch.tokens[row, :n].tolist(), batch.kept[row, :n].tolist(), batch.open_gaps[row, : n + 1].tolist())
        for row, n in enumerate(batch.lengths.tolist())
    ]


def test_documents_come_back_as_they_went_in_in_any_order(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    assert len(store) == 4 and store.documents(range(4)).lengths.tolist() == [3, 1, 2, 4]
    assert read(store, range(4)) == DOCUMENTS
    assert read(store, [3, 0, 3]) == [DOCUMENTS[3], DOCUMENTS[0], DOCUMENTS[3]]


def test_padding_is_zero_not_kept_and_closed(tmp_path: Path) -> None:
    batch = TokenStore.open(write(tmp_path / "data")).documents([1, 3])
    assert batch.tokens.shape == (2, 4) and batch.open_gaps.shape == (2, 5)
    assert not batch.tokens[0, 1:].any() and not batch.kept[0, 1:].any() and not batch.open_gaps[0, 2:].any()


def test_what_is_given_can_be_read_without_the_tokens(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    for indices in ([3, 0, 3], [1], []):
        kept, lengths = store.kept(indices)
        batch = store.documents(indices)
        assert torch.equal(lengths, batch.lengths)
        assert torch.equal(kept, batch.kept[torch.arange(batch.kept.shape[1]) < lengths[:, None]])
    with pytest.raises(IndexError):
        store.kept([4])


def test_a_store_sent_to_another_process_is_opened_there_not_copied(tmp_path: Path) -> None:
    """Where workers are not forked (and from Python 3.14 on they are not) they get the store pickled."""
    documents = [([7] * 1000, [False] * 1000, [True] * 1001)] * 20
    store = TokenStore.open(write(tmp_path / "data", documents))
    sent = pickle.dumps(store)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert read(again, [0, 19]) == read(store, [0, 19]) and isinstance(again.tokens, np.memmap)


def test_no_documents_make_an_empty_batch(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    assert store.documents([]).tokens.shape == (0, 0)
    held_out = TokenStore.open(tmp_path / "data", "held_out")
    assert len(held_out) == 0 and held_out.documents([]).open_gaps.shape == (0, 1)


def test_an_index_outside_raises_instead_of_wrapping_around(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    for index in (4, -1):
        with pytest.raises(IndexError):
            store.documents([index])


def test_arrays_are_memory_mapped(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    assert all(isinstance(array, np.memmap) for array in (store.tokens, store.flags, store.offsets))


def test_the_manifest_counts_deletable_tokens_and_holes(tmp_path: Path) -> None:
    record = TokenStore.open(write(tmp_path / "data")).record
    assert record.mean_deletable_tokens == (2 + 1 + 0 + 2) / 4
    assert record.mean_gap == 5 / 5  # five holes: one of two tokens, three of one, one empty
    assert record.lengths == [(1, 1), (2, 1), (4, 2)] and record.longest == 4 and record.median_length == 2


def test_the_manifest_survives_json(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    assert Manifest.from_dict(json.loads(json.dumps(store.manifest.to_dict()))) == store.manifest


def test_equal_data_has_equal_digests_and_other_data_another(tmp_path: Path) -> None:
    first, second = (TokenStore.open(write(tmp_path / name)) for name in ("a", "b"))
    assert first.digest == second.digest and first.manifest.digest == second.manifest.digest
    other = TokenStore.open(write(tmp_path / "c", [*DOCUMENTS[:3], ([9], [False], [True, True])]))
    assert other.digest != first.digest and other.manifest.digest != first.manifest.digest


def test_a_truncated_or_missing_file_is_refused_at_open(tmp_path: Path) -> None:
    path = write(tmp_path / "data")
    file = path / "train" / "tokens.npy"
    content = file.read_bytes()
    file.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="tokens.npy: expected .* bytes"):
        TokenStore.open(path)
    file.unlink()
    with pytest.raises(ValueError, match="missing"):
        TokenStore.open(path)


def test_a_flipped_byte_is_found_by_verify(tmp_path: Path) -> None:
    path = write(tmp_path / "data")
    file = path / "train" / "tokens.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = TokenStore.open(path)
    with pytest.raises(ValueError, match="contents changed"):
        store.verify()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 99}', '{"format_version": 1}', "\x00"])
def test_a_broken_manifest_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "data")
    (path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match="manifest.json") as refusal:
        TokenStore.open(path)
    assert "\n" not in str(refusal.value)


def test_a_directory_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make a data directory"):
        TokenStore.open(tmp_path)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StoreWriter(tmp_path / "data") as writer:
        writer.splits["train"].append(*DOCUMENTS[0])
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_data_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "data")
    with pytest.raises(ValueError, match="--overwrite"):
        StoreWriter(path)
    assert len(TokenStore.open(path)) == 4
    write(path, DOCUMENTS[:1], overwrite=True)
    assert len(TokenStore.open(path)) == 1 and [child.name for child in tmp_path.iterdir()] == ["data"]


def test_anything_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("1")
    (tmp_path / "file").write_text("2")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="not a data directory"):
            check_destination(tmp_path / name, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert len(TokenStore.open(write(tmp_path / "empty"))) == 4


def test_a_closed_gap_beside_a_deletable_token_is_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "data") as writer:
        for gaps in ([False, True], [True, False]):
            with pytest.raises(ValueError, match="must be open"):
                writer.splits["train"].append([1], [False], gaps)


def model(**changes) -> SimpleNamespace:
    values = {"vocab_size": 264, "mask_token_id": 258, "pad_token_id": 257, "max_sequence_length": 64}
    return SimpleNamespace(**{**values, **changes})


def test_a_store_fits_its_model_and_a_larger_vocabulary(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    store.check_fits(model(), window=4)
    store.check_fits(model(vocab_size=126464))


@pytest.mark.parametrize(
    ("changes", "window", "named"),
    [
        ({"vocab_size": 261}, None, r"vocab_size: token '<\|eot_id\|>' has id 261, the model has 261 rows"),
        ({"mask_token_id": 5}, None, "mask_token_id is 258 in the data, 5 in the model"),
        ({"pad_token_id": 0}, None, "pad_token_id is 257"),
        ({"max_sequence_length": 3}, None, "longest document has 4 tokens, the max_sequence_length of the model is 3"),
        ({}, 3, "the window of the recipe is 3"),
    ],
)
def test_a_store_for_another_model_is_refused_by_field(tmp_path: Path, changes, window, named: str) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    with pytest.raises(ValueError, match=named):
        store.check_fits(model(**changes), window=window)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans(), st.booleans()), max_size=9), max_size=9))
def test_any_documents_round_trip(tmp_path_factory: pytest.TempPathFactory, rows) -> None:
    documents = []
    for row in rows:
        kept = [k for _, k, _ in row]
        gaps = [o or not k for _, k, o in row] + [False]
        gaps = [gap or (j > 0 and not kept[j - 1]) for j, gap in enumerate(gaps)]
        documents.append(([token for token, _, _ in row], kept, gaps))
    path = write(tmp_path_factory.mktemp("store") / "data", documents)
    store = TokenStore.open(path)
    store.verify()
    assert read(store, range(len(documents))) == documents


def test_records_are_immutable(tmp_path: Path) -> None:
    store = TokenStore.open(write(tmp_path / "data"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        store.manifest.template = "text"  # type: ignore[misc]
