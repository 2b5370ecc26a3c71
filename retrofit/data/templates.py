"""Templates: how one row becomes tokens, which of them are kept (given), and which gaps are open (to be written in).

=============== ====================================================== =================================================
template        row                                                    kept | learnt
=============== ====================================================== =================================================
text            {"text"}                                               nothing | all; split at blank lines if too long
chat            {"question", "answer"} or {"messages": [{"role",       headers, questions, the end of an earlier turn |
                "content"}, ...]}, the last by the assistant           the assistant's contents
gsm8k           {"question", "answer": "rationale #### final"}         as chat | rationale and \\boxed{final}
infilling       {"prompt", "middle" or "canonical_solution", "suffix"} prompt and suffix | the middle
spans           {"spans": [{"text", "kept"}, ...]}                     the spans that say so | the others
=============== ====================================================== =================================================

Every piece is tokenised by itself, so that the kept tokens are exactly those that `generate` builds from the same
prompt: where pieces were joined first, tokens could merge across the joint. Special tokens are put in by id. Text that
spells one ("<|endoftext|>" in a web page) is tokenised as the characters it is made of. A learnt piece ends where its
gaps end: end-of-sequence and end-of-turn tokens are never deletable.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from retrofit.data.sources import RowError, json_type

START, START_HEADER, END_HEADER, END_TURN = "<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"


@dataclass(frozen=True)
class Piece:
    """A run of tokens with one fate."""

    token_ids: list[int]
    kept: bool


@dataclass(frozen=True)
class Document:
    """n tokens, n kept flags, n + 1 gap flags (entry j is the gap before token j, entry n the gap after the last)."""

    token_ids: list[int]
    kept: list[bool]
    open_gaps: list[bool]


# ---------------------------------------------------------------------------------------------------------------------
# Helpers that `generate` shares
# ---------------------------------------------------------------------------------------------------------------------


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text: no special token is added, and none is recognised in it."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])


def special_id(tokenizer: Any, token: str) -> int:
    """The id of a special token. Raises ValueError when the tokenizer has none of that name."""
    index = tokenizer.convert_tokens_to_ids(token)
    if index is None or index == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token!r}, which the chat form needs: use LLaDA's tokenizer")
    return int(index)


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """LLaDA's chat form up to where the answer begins:

    `<|startoftext|><|start_header_id|>user<|end_header_id|>\\n\\n{question}<|eot_id|>`
    `<|start_header_id|>assistant<|end_header_id|>\\n\\n`
    """
    start = [special_id(tokenizer, START)]
    return start + _given_turn(tokenizer, "user", question) + _turn(tokenizer, "assistant", "")


def infilling_prompt(tokenizer: Any, prefix: str, suffix: str, question: str | None = None) -> Document:
    """A prefix and a suffix, both kept, and between them the one open gap; of an answer, if there is a question."""
    given = [] if question is None else chat_prompt(tokenizer, question)
    pieces = [Piece(given + encode(tokenizer, prefix), True), Piece([], False), Piece(encode(tokenizer, suffix), True)]
    return assemble(pieces)


def assemble(pieces: Sequence[Piece]) -> Document:
    """Join pieces. Gaps beside a learnt token are open, and so is the place of an empty learnt piece; others closed."""
    token_ids: list[int] = []
    kept: list[bool] = []
    open_gaps = [False]
    for piece in pieces:
        if not piece.kept:
            open_gaps[-1] = True
        token_ids += piece.token_ids
        kept += [piece.kept] * len(piece.token_ids)
        open_gaps += [not piece.kept] * len(piece.token_ids)
    return Document(token_ids, kept, open_gaps)


def _turn(tokenizer: Any, role: str, content: str) -> list[int]:
    """A turn's header and content, without its end. What follows the header is one text, as in LLaDA's own form."""
    header = [special_id(tokenizer, START_HEADER), *encode(tokenizer, role), special_id(tokenizer, END_HEADER)]
    return header + encode(tokenizer, "\n\n" + content)


def _given_turn(tokenizer: Any, role: str, content: str) -> list[int]:
    return [*_turn(tokenizer, role, content), special_id(tokenizer, END_TURN)]


# ---------------------------------------------------------------------------------------------------------------------
# The templates: row -> documents, or RowError
# ---------------------------------------------------------------------------------------------------------------------


class Encoder:
    """Tokenises fields of rows and refuses what must not get in: special ids, text that is not Unicode."""

    def __init__(self, tokenizer: Any, forbidden: dict[int, str]) -> None:
        """`forbidden`: the special tokens by id."""
        self.tokenizer, self.forbidden = tokenizer, forbidden

    def __call__(self, text: str, field: str) -> list[int]:
        self.check_unicode(text, field)
        token_ids = encode(self.tokenizer, text)
        self.check_ids(token_ids, field)
        return token_ids

    def given_turn(self, role: str, content: str, field: str) -> list[int]:
        self.check_unicode(content, field)
        turn = _given_turn(self.tokenizer, role, content)
        header = 2 + len(encode(self.tokenizer, role))
        self.check_ids(turn[header:-1], field)
        return turn

    def check_unicode(self, text: str, field: str) -> None:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            reason = f"{field}: half a surrogate pair at character {error.start + 1}"
            raise RowError("invalid UTF-8", reason, field=field) from error

    def check_ids(self, token_ids: list[int], field: str) -> None:
        if found := self.forbidden.keys() & token_ids:
            token = self.forbidden[min(found)]
            raise RowError("special token in content", f"{field}: holds the special token {token}", field=field)


Template = Callable[[dict[str, Any], Encoder, int], list[Document]]


def text(row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """The whole text is learnt. One of more than `max_length` tokens is split, and its parts again, at the blank line
    nearest the middle, for want of one at the line break nearest it; the break itself belongs to no part."""
    waiting, documents = [_string(row, "text")], []
    while waiting:
        part = waiting.pop()
        token_ids = encoder(part, "text")
        if len(token_ids) <= max_length:
            documents.append(assemble([Piece(token_ids, False)]))
            continue
        halves = _halves(part)
        if halves is None:
            reason = f"{len(token_ids)} tokens without a line break are more than max_length {max_length}"
            raise RowError("too long", reason, field="text", tokens=len(token_ids))
        waiting += reversed(halves)
    return documents


def chat(row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """Questions are kept, the assistant's contents learnt; the last turn has no end token, its gaps end it."""
    if "messages" in row:
        return [_conversation(_messages(row), encoder)]
    question, answer = _string(row, "question"), _string(row, "answer")
    return [_conversation([("user", question, "question"), ("assistant", answer, "answer")], encoder)]


def gsm8k(row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """GSM8K's rows: "rationale #### final" becomes `<reasoning>\\n...\\n</reasoning>\\n\\boxed{final}`.

    The calculator annotations (`<<48/2=24>>`) are calls of a tool, not text for a reader: they are taken out.
    """
    question, answer = _string(row, "question"), _string(row, "answer")
    rationale, mark, final = answer.rpartition("####")
    if not mark or not final.strip():
        raise RowError("no final answer", "answer: no '#### final' at its end", field="answer")
    rationale = re.sub(r"<<[^<>]*>>", "", rationale).strip()
    answer = f"<reasoning>\n{rationale}\n</reasoning>\n\\boxed{{{final.strip()}}}"
    return [_conversation([("user", question, "question"), ("assistant", answer, "answer")], encoder)]


def infilling(row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """Prefix and suffix are kept, the middle learnt, each byte for byte."""
    prefix, suffix = _string(row, "prompt", empty=True), _string(row, "suffix", empty=True)
    name = "middle" if "middle" in row or "canonical_solution" not in row else "canonical_solution"
    middle = _string(row, name, empty=True)  # blanks are a middle like another; `apply` refuses one of no tokens
    pieces = [Piece(encoder(prefix, "prompt"), True), Piece(encoder(middle, name), False)]
    return [assemble([*pieces, Piece(encoder(suffix, "suffix"), True)])]


def spans(row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """Any pattern of kept and learnt pieces; an empty learnt span is a hole that stays empty."""
    pieces = []
    for index, span in enumerate(_list(row, "spans")):
        place = f"spans[{index}]"
        content = _string(_typed(span, dict, place), "text", f"{place}.", empty=True)
        kept = _typed(span.get("kept", ...), bool, f"{place}.kept")
        pieces.append(Piece(encoder(content, f"{place}.text"), kept))
    return [assemble(pieces)]


TEMPLATES: dict[str, Template] = {
    "text": text,
    "chat": chat,
    "gsm8k": gsm8k,
    "infilling": infilling,
    "spans": spans,
}


def apply(template: str, row: dict[str, Any], encoder: Encoder, max_length: int) -> list[Document]:
    """The documents of one row, each with something to learn and of at most `max_length` tokens, or RowError."""
    documents = TEMPLATES[template](row, encoder, max_length)
    for document in documents:
        total, given = len(document.token_ids), sum(document.kept)
        if given == total:
            raise RowError("empty answer", "there is no token to learn", tokens=total)
        if given >= max_length:
            reason = f"prompt of {given} tokens leaves no room for the answer (max_length is {max_length})"
            raise RowError("no room for the answer", reason, prompt_tokens=given, tokens=total)
        if total > max_length:
            reason = f"{total} tokens ({given} kept, {total - given} to learn) are more than max_length {max_length}"
            raise RowError("too long", reason, prompt_tokens=given, tokens=total)
    return documents


def _conversation(messages: list[tuple[str, str, str]], encoder: Encoder) -> Document:
    """`messages`: (role, content, the field's name for errors). The assistant speaks last."""
    tokenizer = encoder.tokenizer
    pieces = [Piece([special_id(tokenizer, START)], True)]
    for index, (role, content, field) in enumerate(messages):
        if role != "assistant":
            pieces.append(Piece(encoder.given_turn(role, content, field), True))
            continue
        pieces.append(Piece(_turn(tokenizer, role, ""), True))
        pieces.append(Piece(encoder(content, field), False))
        if index + 1 < len(messages):
            pieces.append(Piece([special_id(tokenizer, END_TURN)], True))
    return assemble(pieces)


def _messages(row: dict[str, Any]) -> list[tuple[str, str, str]]:
    messages = []
    for index, message in enumerate(_list(row, "messages")):
        place = f"messages[{index}]"
        role = _string(_typed(message, dict, place), "role", f"{place}.")
        if role not in ("system", "user", "assistant"):
            reason = f"{place}.role: expected system, user or assistant, found {role!r}"
            raise RowError("bad role", reason, field=f"{place}.role", expected="system, user or assistant", found=role)
        content = _string(message, "content", f"{place}.", empty=role != "assistant")
        messages.append((role, content, f"{place}.content"))
    if not messages or messages[-1][0] != "assistant":
        raise RowError("bad role", "messages: the last must be the assistant's", field="messages")
    return messages


def _halves(text: str) -> tuple[str, str] | None:
    """Both sides of the blank line, or else the line break, nearest the middle; None where there is none."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - 1  # a break outside would leave a blank half
    for pattern in (r"\n(?:[ \t]*\n)+", r"\n"):
        breaks = [match for match in re.finditer(pattern, text) if first < match.start() and match.end() <= last]
        if breaks:
            nearest = min(breaks, key=lambda match: abs(match.start() + match.end() - len(text)))
            return text[: nearest.start()], text[nearest.end() :]
    return None


_JSON_NAMES: dict[type, str] = {str: "string", bool: "boolean", list: "array", dict: "object"}


def _typed(value: Any, kind: type, field: str) -> Any:
    """`value` where it is of this type; `...` stands for a field that is absent."""
    expected = _JSON_NAMES[kind]
    if value is ...:
        reason = f"{field}: missing, expected {_article(expected)}"
        raise RowError("missing field", reason, field=field, expected=expected, found="missing")
    if not isinstance(value, kind):
        reason = f"{field}: expected {_article(expected)}, found {json_type(value)}"
        raise RowError("wrong type", reason, field=field, expected=expected, found=json_type(value))
    return value


def _string(row: dict[str, Any], name: str, place: str = "", *, empty: bool = False) -> str:
    """The string `row[name]`; blank ones are refused unless `empty` are allowed."""
    value: str = _typed(row.get(name, ...), str, place + name)
    if not empty and not value.strip():
        kind = "empty answer" if name in ("answer", "content") else "empty field"
        raise RowError(kind, f"{place}{name}: empty", field=place + name)
    return value


def _list(row: dict[str, Any], name: str) -> list[Any]:
    value: list[Any] = _typed(row.get(name, ...), list, name)
    return value


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
