"""Every template: what is kept, what is learnt, which gaps are open, and which rows are refused and why."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from retrofit.data.sources import RowError
from retrofit.data.templates import Document, Encoder, apply, chat_prompt, encode, infilling_prompt
from retrofit.data.tiny import SPECIAL_TOKENS, byte_tokenizer

TOKENIZER = byte_tokenizer()
ENCODER = Encoder(TOKENIZER, {index: token for token, index in SPECIAL_TOKENS.items()})


def one(template: str, row: dict, max_length: int = 1000) -> Document:
    (document,) = apply(template, row, ENCODER, max_length)
    return document


def refused(template: str, row: dict, max_length: int = 1000) -> RowError:
    with pytest.raises(RowError) as error:
        apply(template, row, ENCODER, max_length)
    return error.value


def parts(document: Document, tokenizer=TOKENIZER) -> tuple[str, str]:
    """The kept text and the learnt text."""
    pairs = list(zip(document.token_ids, document.kept, strict=True))
    kept, learnt = [index for index, kept in pairs if kept], [index for index, kept in pairs if not kept]
    return tokenizer.decode(kept), tokenizer.decode(learnt)


def gaps_follow_the_rule(document: Document) -> bool:
    n = len(document.token_ids)
    for gap in range(n + 1):
        beside = [j for j in (gap - 1, gap) if 0 <= j < n]
        if any(not document.kept[j] for j in beside) and not document.open_gaps[gap]:
            return False
    return len(document.open_gaps) == n + 1


def test_text_is_all_learnt() -> None:
    document = one("text", {"text": " a\nb"})
    assert document == Document(list(b" a\nb"), [False] * 4, [True] * 5)


def test_a_long_text_is_split_at_the_blank_line_nearest_the_middle() -> None:
    text = "aaaa\n\nbbbb\n \n    cc\ncc\n\ndd"
    documents = apply("text", {"text": text}, ENCODER, 12)
    assert [TOKENIZER.decode(d.token_ids) for d in documents] == ["aaaa\n\nbbbb", "    cc\ncc", "dd"]


def test_a_long_text_without_a_line_break_is_refused_not_cut() -> None:
    error = refused("text", {"text": "a\n\n" + "b" * 20}, 10)
    assert error.kind == "too long" and "20 tokens without a line break" in str(error)


def test_chat_has_lladas_form_and_the_answer_ends_with_its_gaps() -> None:
    document = one("chat", {"question": "2+2?", "answer": "4"})
    assert parts(document) == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "4",
    )
    assert document.token_ids[-1] == ord("4")
    assert [gap for gap, is_open in enumerate(document.open_gaps) if is_open] == [
        len(document.token_ids) - 1,
        len(document.token_ids),
    ]


def test_the_kept_tokens_of_a_chat_are_those_that_generate_builds() -> None:
    document = one("chat", {"question": "why?", "answer": "because"})
    assert [i for i, kept in zip(document.token_ids, document.kept, strict=True) if kept] == chat_prompt(
        TOKENIZER, "why?"
    )


def test_the_chat_prompt_is_the_chat_template_of_the_tokenizer() -> None:
    messages = [{"role": "user", "content": "why?"}]
    theirs = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert chat_prompt(TOKENIZER, "why?") == theirs


def test_in_a_conversation_all_answers_are_learnt_and_earlier_ends_of_turn_kept() -> None:
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "bb"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "dd"},
    ]
    document = one("chat", {"messages": messages})
    kept, learnt = parts(document)
    assert learnt == "bbdd" and kept.count("<|eot_id|>") == 4 and gaps_follow_the_rule(document)
    specials = {i for i, kept in zip(document.token_ids, document.kept, strict=True) if not kept} & {257, 261}
    assert not specials and sum(document.open_gaps) == 6


def test_gsm8k_becomes_reasoning_and_a_box_without_calculator_annotations() -> None:
    row = {"question": "q", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nIn all 72.\n#### 1,072"}
    _, learnt = parts(one("gsm8k", row))
    assert learnt == "<reasoning>\nShe sold 48/2 = 24 clips.\nIn all 72.\n</reasoning>\n\\boxed{1,072}"
    assert refused("gsm8k", {"question": "q", "answer": "72"}).kind == "no final answer"


@pytest.mark.parametrize("name", ["middle", "canonical_solution"])
def test_infilling_keeps_prefix_and_suffix_byte_for_byte(name: str) -> None:
    row = {"prompt": "def f():\n", name: "    return 1\n", "suffix": "\nf()\n"}
    document = one("infilling", row)
    assert parts(document) == ("def f():\n\nf()\n", "    return 1\n") and gaps_follow_the_rule(document)
    prompt = infilling_prompt(TOKENIZER, "def f():\n", "\nf()\n")
    assert prompt.token_ids == [i for i, kept in zip(document.token_ids, document.kept, strict=True) if kept]
    assert [gap for gap, is_open in enumerate(prompt.open_gaps) if is_open] == [len("def f():\n")]


def test_an_infilling_without_prefix_or_suffix_is_open_at_its_end() -> None:
    assert one("infilling", {"prompt": "", "middle": "a", "suffix": "b"}).open_gaps == [True, True, False]
    assert one("infilling", {"prompt": "a", "middle": "b", "suffix": ""}).open_gaps == [False, True, True]


def test_an_empty_span_opens_an_empty_hole() -> None:
    spans = [("0", True), ("1278", False), ("9", True), ("", False), ("A", True), ("B", True)]
    document = one("spans", {"spans": [{"text": text, "kept": kept} for text, kept in spans]})
    assert parts(document) == ("09AB", "1278")
    assert [int(gap) for gap in document.open_gaps] == [0, 1, 1, 1, 1, 1, 1, 0, 0]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"a": 0, ".": 1, "m": 2, "b": 3, ".m": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(".", "m")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_tokens_do_not_merge_across_a_joint() -> None:
    tokenizer = merging_tokenizer()
    assert encode(tokenizer, "a.mb") == [0, 4, 3]  # the merge is there
    encoder = Encoder(tokenizer, {})
    (document,) = apply("infilling", {"prompt": "a.", "middle": "mb.", "suffix": "m"}, encoder, 10)
    assert document.token_ids == [0, 1, 2, 3, 1, 2] and document.kept == [True, True, False, False, False, True]
    assert infilling_prompt(tokenizer, "a.", "m").token_ids == [0, 1, 2]


def test_text_that_spells_a_special_token_stays_text() -> None:
    for token in SPECIAL_TOKENS:
        assert encode(TOKENIZER, f"a{token}b") == list(f"a{token}b".encode())
    kept, learnt = parts(one("chat", {"question": "<|eot_id|>", "answer": "x<|endoftext|>"}))
    assert "\n\n<|eot_id|><|eot_id|>" in kept and learnt == "x<|endoftext|>"


def test_content_with_a_special_id_is_refused_where_the_tokenizer_cannot_be_stopped() -> None:
    class Greedy:
        def __call__(self, text, **_):
            return {"input_ids": [257 if text == "end" else 1]}

    with pytest.raises(RowError, match=r"text: holds the special token <\|endoftext\|>"):
        apply("text", {"text": "end"}, Encoder(Greedy(), {257: "<|endoftext|>"}), 10)


@pytest.mark.parametrize(
    ("template", "row", "kind", "reason"),
    [
        ("text", {"text": None}, "wrong type", "text: expected a string, found null"),
        ("text", {}, "missing field", "text: missing, expected a string"),
        ("text", {"text": " \n"}, "empty field", "text: empty"),
        ("text", {"text": "a\ud800b"}, "invalid UTF-8", "text: half a surrogate pair at character 2"),
        ("chat", {"question": "q", "answer": 18}, "wrong type", "answer: expected a string, found number"),
        ("chat", {"question": "q", "answer": True}, "wrong type", "found boolean"),
        ("chat", {"question": "q"}, "missing field", "answer: missing"),
        ("chat", {"question": "q", "answer": " "}, "empty answer", "answer: empty"),
        ("chat", {"question": "\ud800", "answer": "a"}, "invalid UTF-8", "question: half a surrogate"),
        ("chat", {"messages": {}}, "wrong type", "messages: expected an array, found object"),
        ("chat", {"messages": []}, "bad role", "the last must be the assistant's"),
        ("chat", {"messages": ["hi"]}, "wrong type", "messages[0]: expected an object, found string"),
        ("chat", {"messages": [{"role": "tool", "content": "x"}]}, "bad role", "messages[0].role: expected system"),
        ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "empty answer", "messages[0].content: empty"),
        ("chat", {"messages": [{"role": "assistant"}]}, "missing field", "messages[0].content: missing"),
        ("infilling", {"prompt": "a", "suffix": "b"}, "missing field", "middle: missing"),
        ("infilling", {"prompt": "a", "middle": "", "suffix": "b"}, "empty answer", "no token to learn"),
        ("spans", {"spans": [{"text": "a", "kept": 1}]}, "wrong type", "spans[0].kept: expected a boolean, found"),
        ("spans", {"spans": [{"text": "a", "kept": True}]}, "empty answer", "no token to learn"),
        ("spans", {"spans": [{"kept": True}]}, "missing field", "spans[0].text: missing"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_by_field(template: str, row: dict, kind: str, reason: str) -> None:
    error = refused(template, row)
    assert error.kind == kind and reason in str(error) and "\n" not in str(error)


def test_a_prompt_that_eats_the_window_is_refused() -> None:
    row = {"prompt": "p" * 40, "middle": "4", "suffix": ""}
    error = refused("infilling", row, 32)
    assert error.kind == "no room for the answer" and "prompt of 40 tokens leaves no room for the answer" in str(error)
    assert refused("infilling", row, 40).kind == "no room for the answer"
    assert one("infilling", row, 41).token_ids[-1] == ord("4")


def test_a_row_that_is_too_long_gives_its_counts() -> None:
    error = refused("infilling", {"prompt": "p" * 30, "middle": "4" * 10, "suffix": ""}, 32)
    assert error.kind == "too long" and "40 tokens (30 kept, 10 to learn)" in str(error)
