"""The verb `generate` on small random models: what is kept stays, what is written is recorded, the rest is refused."""

import json

import pytest
import torch

from retrofit.checkpoints.loading import load_model, load_tokenizer, resolve, unwritable_token_ids
from retrofit.data.templates import chat_prompt, encode
from retrofit.data.tiny import init
from retrofit.flexmdm import FlexMDMForMaskedDiffusion
from retrofit.generate import generate


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    """A random LLaDA of 270 embedding rows for the tokenizer's 262 tokens."""
    path = tmp_path_factory.mktemp("models") / "llada"
    shape = {"layers": 1, "d_model": 16, "heads": 2, "kv_heads": None, "mlp_hidden": 32}
    init(path, **shape, vocab_size=270, max_sequence_length=96, tied=False, seed=0)
    return str(path)


@pytest.fixture(scope="module")
def flexmdm(llada, tmp_path_factory):
    """The same with new modules, in its own directory; its gaps expect about 12 tokens in all."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "flexmdm"
    model = FlexMDMForMaskedDiffusion.from_pretrained(llada, flexmdm_config={"mean_deletable_tokens": 12.0})
    model.save_pretrained(path)
    load_tokenizer(resolve(llada)).save_pretrained(path)
    return str(path)


@pytest.fixture
def rows(tmp_path):
    """Calls `generate` and returns the rows of its output file."""

    def rows(checkpoint: str, **options) -> list[dict]:
        output = tmp_path / "samples.jsonl"
        output.unlink(missing_ok=True)
        generate(checkpoint, output=output, **options)
        return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return rows


def test_hole_is_filled_between_prefix_and_suffix_that_come_back_byte_for_byte(flexmdm, rows):
    prefix, suffix = "  def f():\r\n\té<|eot_id|>", "\n 日本 \n\n"
    found = rows(flexmdm, prefix=prefix, suffix=suffix, steps=8, num=6)
    before, after = list(prefix.encode()), list(suffix.encode())
    for row in found:
        assert row["text"].startswith(prefix) and row["text"].endswith(suffix)
        assert row["token_ids"][: len(before)] == before and row["token_ids"][-len(after) :] == after
        middle = row["kept"][len(before) : -len(after)]
        assert row["kept"] == [True] * len(before) + [False] * len(middle) + [True] * len(after)
        assert row["length"] == len(row["token_ids"]) == len(row["kept"])
    assert sum(row["length"] for row in found) > 6 * (len(before) + len(after))


def test_continuation_starts_with_the_prompt_and_each_prompt_has_its_samples(flexmdm, rows):
    found = rows(flexmdm, prompts=["ab", "xyz"], steps=8, num=2)
    assert [row["text"][:2] for row in found] == ["ab", "ab", "xy", "xy"]
    assert found[0]["token_ids"] != found[1]["token_ids"]


def test_same_seed_gives_the_same_samples_and_another_does_not(flexmdm, rows):
    samples = [[row["token_ids"] for row in rows(flexmdm, seed=seed, steps=8, num=3)] for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_samples_do_not_depend_on_the_batch(flexmdm, rows, monkeypatch):
    whole = [row["token_ids"] for row in rows(flexmdm, steps=4, num=5)]
    monkeypatch.setattr("retrofit.generate.BATCH_SIZE", 2)
    assert [row["token_ids"] for row in rows(flexmdm, steps=4, num=5)] == whole


def test_no_special_token_and_no_id_without_a_token_is_written(flexmdm, rows):
    found = rows(flexmdm, steps=8, num=16, temperature=50.0)
    assert max(max(row["token_ids"], default=0) for row in found) < 256
    model, tokenizer = load_model(flexmdm)
    assert unwritable_token_ids(tokenizer, model.config.vocab_size) == list(range(256, 270))


def test_settings_of_the_sampler_are_written_with_defaults_resolved(flexmdm, llada, rows):
    settings = rows(flexmdm, steps=4)[0]["settings"]
    expected = {"steps": 4, "temperature": 1.0, "seed": 0, "order": "random", "counts": "binomial", "max_length": 95}
    assert expected.items() <= settings.items() and settings["model_type"] == "flexmdm"
    settings = rows(llada, prompts=["a"], answer_length=8)[0]["settings"]
    expected = {"steps": 8, "temperature": 0.0, "seed": 0, "answer_length": 8, "block_length": 8}
    assert expected.items() <= settings.items() and settings["model_type"] == "llada"


def test_length_limit_truncates_and_says_so(flexmdm, rows):
    found = rows(flexmdm, steps=4, num=4, prompts=["abcd"], max_length=5)
    assert all(row["length"] <= 5 for row in found) and any(row["truncated"] for row in found)


def test_mdm_answers_a_chat_question_in_its_own_template(llada, rows):
    (row,) = rows(llada, prompts=["Why?"], chat=True, answer_length=6)
    given = chat_prompt(load_tokenizer(resolve(llada)), "Why?")
    assert row["token_ids"][: len(given)] == given and row["kept"][: len(given)] == [True] * len(given)
    assert row["length"] <= len(given) + 6 and not any(row["kept"][len(given) :])


def test_texts_are_printed_alone_and_what_is_known_of_them_goes_to_stderr(flexmdm, llada, capsys):
    generate(flexmdm, prompts=["ab"], steps=4)
    out, err = capsys.readouterr()
    assert out.startswith("ab") and out.endswith("\n") and " forward passes" in err and "ab" not in err
    generate(llada, prompts=["Why?"], chat=True, answer_length=4)
    assert "Why?" not in capsys.readouterr().out


def test_options_of_the_other_sampler_are_refused(flexmdm, llada):
    with pytest.raises(ValueError, match="--answer-length, --block-length: a FlexMDM ends its texts itself"):
        generate(flexmdm, answer_length=4, block_length=4)
    with pytest.raises(ValueError, match="--order, --max-length: this is an MDM"):
        generate(llada, answer_length=4, order="random", max_length=5)
    with pytest.raises(ValueError, match="give --answer-length"):
        generate(llada)
    with pytest.raises(ValueError, match="only continues a --prompt"):
        generate(llada, prefix="a", answer_length=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "--num must be at least 1"),
        ({"prefix": "a", "prompts": ["b"]}, "give one or the other"),
        ({"chat": True}, "--chat needs a question"),
        ({"prompts": ["\udc80"]}, "not valid UTF-8"),
    ],
)
def test_contradictions_are_refused_before_a_model_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        generate("no-such-model", **options)


@pytest.mark.parametrize("max_length", [0, 96, 1000])
def test_length_over_the_models_is_refused(flexmdm, max_length):
    with pytest.raises(ValueError, match=f"--max-length {max_length}: this model takes 1 to 95 tokens"):
        generate(flexmdm, max_length=max_length)


def test_prompt_over_the_length_is_refused(flexmdm):
    with pytest.raises(ValueError, match="prompt 0: its 200 tokens exceed"):
        generate(flexmdm, prompts=["a" * 200])


def test_existing_output_and_missing_directory_are_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "taken.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"taken\.jsonl: exists already"):
        generate("no-such-model", output=tmp_path / "taken.jsonl")
    assert (tmp_path / "taken.jsonl").read_text() == "mine"
    with pytest.raises(ValueError, match="there is no directory"):
        generate("no-such-model", output=tmp_path / "none" / "a.jsonl")


def test_text_that_the_tokenizer_changes_is_refused(flexmdm, monkeypatch):
    monkeypatch.setattr("retrofit.data.templates.encode", lambda tokenizer, text: encode(tokenizer, text.strip()))
    with pytest.raises(ValueError, match="does not give back the text"):
        generate(flexmdm, prompts=[" a"])


def test_a_hole_in_the_answer_to_a_question_is_filled(flexmdm, rows, capsys):
    hole = {"prompts": ["Why?"], "chat": True, "prefix": "As ", "suffix": " so.", "steps": 4}
    (row,) = rows(flexmdm, **hole)
    given = chat_prompt(load_tokenizer(resolve(flexmdm)), "Why?")
    assert row["token_ids"][: len(given)] == given
    generate(flexmdm, **hole)
    out, _ = capsys.readouterr()
    assert out.startswith("As ") and out.endswith(" so.\n")
    with pytest.raises(ValueError, match="one --prompt, the question"):
        rows(flexmdm, prompts=["a", "b"], chat=True, prefix="x", steps=4)
