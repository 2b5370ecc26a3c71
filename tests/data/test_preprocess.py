"""Rows in, a store out: every row accounted for, nothing half-written, and splits that stay put."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from retrofit.data.preprocess import preprocess
from retrofit.data.store import TokenStore
from retrofit.data.templates import chat_prompt
from retrofit.data.tiny import byte_tokenizer, init


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("models") / "tiny"
    init(path, layers=1, d_model=8, heads=2, mlp_hidden=8)
    return str(path)


def write_rows(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(source: str | list[str], out: Path, tiny: str, **changes) -> TokenStore:
    options = {"template": "text", "max_length": 64, "held_out": 0.0, "max_rejected": 0.1, "seed": 0}
    preprocess([source] if isinstance(source, str) else source, out, tokenizer=tiny, **{**options, **changes})
    return TokenStore.open(out)


def rejects(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(store: TokenStore) -> list[str]:
    batch, tokenizer = store.documents(range(len(store))), byte_tokenizer()
    return [tokenizer.decode(row[:n].tolist()) for row, n in zip(batch.tokens, batch.lengths, strict=True)]


def test_a_file_saved_on_windows_gives_the_tokens_of_a_plain_one(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "w.jsonl").write_bytes(b'\xef\xbb\xbf{"text":"a b"}\r\n\r\n{"text":"c"}')
    (tmp_path / "p.jsonl").write_bytes(b'{"text":"a b"}\n{"text":"c"}\n')
    windows = run(str(tmp_path / "w.jsonl"), tmp_path / "w", tiny)
    plain = run(str(tmp_path / "p.jsonl"), tmp_path / "p", tiny)
    assert windows.digest == plain.digest and windows.manifest.rows == 2 and not windows.manifest.rejected
    assert (tmp_path / "w" / "rejects.jsonl").read_bytes() == b""


def bad_answers(count: int) -> list[dict]:
    rows: list[dict] = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(100)]
    answers: list[dict] = [{"answer": None}, {"answer": 18}, {}]
    for i in range(count):
        rows[i * 100 // count] = {"question": "q", **answers[i % 3]}
    return rows


def test_three_bad_rows_of_a_hundred_are_counted_and_written_out(tmp_path: Path, tiny: str, capsys) -> None:
    source = write_rows(tmp_path / "a.jsonl", bad_answers(3))
    store = run(source, tmp_path / "out", tiny, template="chat", max_length=128)
    assert store.manifest.kept == len(store) == 97
    assert store.manifest.rejected == {"missing field": 1, "wrong type": 2}
    assert "100 read = 97 kept + 3 rejected" in capsys.readouterr().out
    for i, reject in enumerate(rejects(tmp_path / "out/rejects.jsonl")):
        found = ("null", "number", "missing")[i]
        assert (reject["source"], reject["line"], reject["field"]) == (source, 1 + i * 100 // 3, "answer")
        assert (reject["expected"], reject["found"]) == ("string", found)
    assert i == 2


def test_sixty_bad_rows_of_a_hundred_are_refused_and_only_the_rejects_stay(tmp_path: Path, tiny: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", bad_answers(60))
    with pytest.raises(ValueError, match="60 of 100 rows rejected.*out.rejects.jsonl") as refusal:
        run(source, tmp_path / "out", tiny, template="chat", max_length=128)
    assert "\n" not in str(refusal.value)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.jsonl", "out.rejects.jsonl"]
    assert len(rejects(tmp_path / "out.rejects.jsonl")) == 60


def test_prompts_that_eat_the_window_are_rejects_and_if_all_do_the_run_refuses(tmp_path: Path, tiny: str) -> None:
    long = {"prompt": "p" * 40, "middle": "4", "suffix": ""}
    rows = [{**long, "prompt": f"{i}"} for i in range(9)]
    source = write_rows(tmp_path / "a.jsonl", [*rows, long])
    store = run(source, tmp_path / "a", tiny, template="infilling", max_length=32)
    (reject,) = rejects(tmp_path / "a" / "rejects.jsonl")
    assert len(store) == 9 and reject["line"] == 10 and reject["prompt_tokens"] == 40
    assert "prompt of 40 tokens leaves no room for the answer" in reject["reason"]
    source = write_rows(tmp_path / "b.jsonl", [long] * 3)
    with pytest.raises(ValueError, match="3 of 3 rows rejected, none is left"):
        run(source, tmp_path / "b", tiny, template="infilling", max_length=32, max_rejected=1.0)


def test_every_kind_of_broken_row_is_counted_once(tmp_path: Path, tiny: str) -> None:
    good = b'{"text": "good"}\n'
    lines = [b"{\n", b'{"text": "\xff"}\n', b"7\n", b'{"text": ""}\n', b'{"text": "' + b"x" * 65 + b'"}\n', b"{}\n"]
    (tmp_path / "a.jsonl").write_bytes(good.join([b"", *lines, b""]))
    store = run(str(tmp_path / "a.jsonl"), tmp_path / "out", tiny, max_rejected=0.5)
    manifest = store.manifest
    assert manifest.rows == 13 and manifest.kept == 7 and sum(manifest.rejected.values()) == 6
    assert manifest.rejected == {
        "bad JSON": 1,
        "empty field": 1,
        "invalid UTF-8": 1,
        "missing field": 1,
        "too long": 1,
        "wrong type": 1,
    }


def test_several_sources_are_read_in_order(tmp_path: Path, tiny: str) -> None:
    (tmp_path / "b.txt").write_text("three\n\nfour\n")
    sources = [write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}]), str(tmp_path / "b.txt")]
    store = run(sources, tmp_path / "out", tiny)
    assert texts(store) == ["one", "two", "three", "four"]
    assert [(source.name, source.rows) for source in store.manifest.sources] == [("a.jsonl", 2), ("b.txt", 2)]


def test_a_document_stays_in_its_split_whatever_else_is_there(tmp_path: Path, tiny: str) -> None:
    rows = [{"text": f"row {i}"} for i in range(200)]
    run(write_rows(tmp_path / "a.jsonl", rows), tmp_path / "a", tiny, held_out=0.3)
    run(write_rows(tmp_path / "b.jsonl", rows[::-2] + rows[::-2]), tmp_path / "b", tiny, held_out=0.3)
    first, second = (set(texts(TokenStore.open(tmp_path / name, "held_out"))) for name in "ab")
    assert second == first & {row["text"] for row in rows[::-2]} and 30 < len(first) < 90
    assert not first & set(texts(TokenStore.open(tmp_path / "a")))


def test_equal_runs_give_equal_bytes(tmp_path: Path, tiny: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(20)])
    first, second = run(source, tmp_path / "a", tiny, held_out=0.2), run(source, tmp_path / "b", tiny, held_out=0.2)
    assert first.manifest == second.manifest
    assert (tmp_path / "a/manifest.json").read_bytes() == (tmp_path / "b/manifest.json").read_bytes()


def test_the_manifest_holds_no_path(tmp_path: Path, tiny: str) -> None:
    run(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "out", tiny)
    text = (tmp_path / "out/manifest.json").read_text()
    assert str(tmp_path) not in text and '"name_or_path": "tiny"' in text


def test_kept_tokens_in_the_store_are_those_that_generate_builds(tmp_path: Path, tiny: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"question": "why?", "answer": "so"}])
    batch = run(source, tmp_path / "out", tiny, template="chat", max_length=128).documents([0])
    assert batch.tokens[0][batch.kept[0]].tolist() == chat_prompt(byte_tokenizer(), "why?")
    assert bytes(batch.tokens[0][~batch.kept[0]].tolist()) == b"so"


def test_a_tokenizer_beyond_the_embedding_is_refused_with_token_id_and_size(tmp_path: Path, tiny: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    added = {**tokenizer["added_tokens"][-1], "content": "<|new|>", "id": 264}
    between = [{**added, "content": f"<|{index}|>", "id": index} for index in (262, 263)]
    tokenizer["added_tokens"] += [*between, added]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"token '<\|new\|>' has id 264, the model beside it has 264 rows"):
        run(write_rows(tmp_path / "a.jsonl", [{"text": "a"}]), tmp_path / "out", str(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"template": "prose"}, "--template prose: unknown, choose one of text, chat"),
        ({"max_length": 0}, "--max-length 0"),
        ({"held_out": 1.0}, "--held-out 1.0"),
        ({"max_rejected": -0.1}, "--max-rejected -0.1"),
    ],
)
def test_a_bad_argument_is_refused_first(tmp_path: Path, changes: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        run("absent.jsonl", tmp_path / "out", "absent", **changes)


def test_bad_sources_tokenizers_and_destinations_are_refused_without_a_trace(tmp_path: Path, tiny: str) -> None:
    source = write_rows(tmp_path / "a.jsonl", [{"text": "a"}])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="absent.jsonl: no such file"):
        run("absent.jsonl", tmp_path / "out", tiny)
    with pytest.raises(ValueError, match="cannot load a tokenizer"):
        run(source, tmp_path / "out", str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="not a data directory"):
        run(source, tmp_path / "a.jsonl", tiny, overwrite=True)
    (tmp_path / "blank.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="no rows in there"):
        run(str(tmp_path / "blank.jsonl"), tmp_path / "out", tiny)
    (tmp_path / "blank.jsonl").unlink()
    assert sorted(tmp_path.iterdir()) == before


def test_progress_stays_out_of_log_files(tmp_path: Path, tiny: str, capsys) -> None:
    run(write_rows(tmp_path / "a.jsonl", [{"text": "a"}] * 50), tmp_path / "out", tiny)
    captured = capsys.readouterr()
    assert captured.err == "" and "50 read = 50 kept + 0 rejected" in captured.out
