"""The verb `generate`: prompts in, texts or JSONL rows with their sampler settings out.

Prefix, hole and suffix are tokenised apart, as in training, and kept tokens keep their ids. The text of a kept run and
of a written run are decoded apart too, so that what was given comes back byte for byte whatever is written beside it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

# Sequences in one call of the sampler: bounds memory. Noise is keyed by each sequence's own index, not by its batch.
BATCH_SIZE = 16


@dataclass(frozen=True)
class _Request:
    """What the options ask for, checked as far as is possible without a model."""

    prompts: list[str]
    hole: tuple[str, str] | None
    """prefix and suffix of an infilling"""
    chat: bool


def generate(
    checkpoint: str,
    *,
    revision: str | None = None,
    prompts: Sequence[str] | None = None,
    chat: bool = False,
    prefix: str | None = None,
    suffix: str | None = None,
    num: int = 1,
    steps: int | None = None,
    temperature: float | None = None,
    seed: int = 0,
    order: str | None = None,
    counts: str | None = None,
    max_length: int | None = None,
    answer_length: int | None = None,
    block_length: int | None = None,
    output: Path | None = None,
) -> None:
    """Draws `num` samples of each prompt (without one, of the empty text) and prints them or writes them to `output`.

    A FlexMDM takes `order`, `counts` and `max_length`; an MDM (a plain LLaDA) takes `answer_length` and `block_length`.
    None means the sampler's default; an option that the model's sampler has no use for is refused.

    Raises:
        ValueError: for options that contradict each other, the model or its tokenizer, and for an existing `output`.
    """
    request = _check(prompts, chat, prefix, suffix, num, output)

    import torch

    from retrofit.checkpoints.loading import load_model
    from retrofit.data.templates import chat_prompt

    model, tokenizer = load_model(checkpoint, revision=revision)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    given = {"steps": steps, "temperature": temperature, "seed": seed}
    flexmdm = {"order": order, "counts": counts, "max_length": max_length}
    mdm = {"answer_length": answer_length, "block_length": block_length}
    if model.config.model_type == "flexmdm":
        _refuse_options(mdm, "a FlexMDM ends its texts itself (--max-length bounds them)")
        settings = _flexmdm_settings(model.config, {**given, **flexmdm})
    else:
        _refuse_options(flexmdm, "this is an MDM, which writes into a window of fixed length (--answer-length)")
        settings = _mdm_settings({**given, **mdm})
        if request.hole:
            raise ValueError(
                "--prefix, --suffix: this is an MDM, which only continues a --prompt; a FlexMDM fills holes"
            )
    record = {"checkpoint": checkpoint, "revision": revision, "model_type": model.config.model_type, **settings}
    if model.config.model_type == "flexmdm":
        record["schedules"] = model.config.schedules.to_dict()  # they decide what steps mean
    rows = []
    for i, sample in enumerate(_sample(model, tokenizer, _encode(tokenizer, request), settings, num)):
        text = _decode_runs(tokenizer, sample.token_ids, sample.kept)
        if output is None:
            answer = len(chat_prompt(tokenizer, request.prompts[i // num])) if chat else 0
            _print(sample, _decode_runs(tokenizer, sample.token_ids[answer:], sample.kept[answer:]))
        rows.append(
            {
                "text": text,
                "token_ids": sample.token_ids,
                "kept": sample.kept,
                "length": len(sample.token_ids),
                "forwards": sample.forwards,
                "truncated": sample.truncated,
                "settings": record,
            }
        )
    if output is not None:
        _write(rows, output)
        print(f"{len(rows)} samples in {output}", file=sys.stderr)


def _check(
    prompts: Sequence[str] | None, chat: bool, prefix: str | None, suffix: str | None, num: int, output: Path | None
) -> _Request:
    if num < 1:
        raise ValueError(f"--num must be at least 1, found {num}")
    if output is not None and output.exists():
        raise ValueError(f"{output}: exists already; remove it or name another --output")
    if output is not None and not output.absolute().parent.is_dir():
        raise ValueError(f"{output}: there is no directory {output.absolute().parent}; make it first")
    hole = None if prefix is None and suffix is None else (prefix or "", suffix or "")
    if hole and prompts and not (chat and len(prompts) == 1):
        raise ValueError(
            "--prefix and --suffix fill a hole and --prompt is continued; give one or the other, or with --chat one "
            "--prompt, the question, and the --prefix and --suffix of its answer"
        )
    if chat and not prompts:
        raise ValueError("--chat needs a question: give it with --prompt")
    for text in [*(prompts or []), *(hole or [])]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError("a prompt, prefix or suffix is not valid UTF-8")
    return _Request(list(prompts or [""]), hole, chat)


def _refuse_options(options: dict[str, Any], reason: str) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: {reason}")


def _flexmdm_settings(config: Any, given: dict[str, Any]) -> dict[str, Any]:
    """All settings of the sampler."""
    longest = config.max_sequence_length - 1  # one row is the end slot
    settings: dict[str, Any] = {"steps": 128, "temperature": 1.0, "order": "random", "counts": "binomial"}
    settings |= {"max_length": longest} | {name: value for name, value in given.items() if value is not None}
    if not 1 <= settings["max_length"] <= longest:
        raise ValueError(f"--max-length {settings['max_length']}: this model takes 1 to {longest} tokens")
    return settings


def _mdm_settings(given: dict[str, Any]) -> dict[str, Any]:
    if given["answer_length"] is None:
        raise ValueError("this is an MDM, which writes into a window of fixed length: give --answer-length TOKENS")
    defaults = {"steps": given["answer_length"], "temperature": 0.0, "block_length": given["answer_length"]}
    return defaults | {name: value for name, value in given.items() if value is not None}


def _encode(tokenizer: Any, request: _Request) -> list[tuple[list[int], list[bool] | None]]:
    """(kept token ids, open gaps) of each prompt; no gaps given: only the last is open."""
    from retrofit.data.templates import chat_prompt, encode, infilling_prompt

    for text in [*request.prompts, *(request.hole or [])]:
        if _decode(tokenizer, encode(tokenizer, text)) != text:
            raise ValueError(f"the tokenizer does not give back the text {text[:40]!r} as it is, so it cannot be kept")
    if request.hole:
        document = infilling_prompt(tokenizer, *request.hole, request.prompts[0] if request.chat else None)
        return [(document.token_ids, document.open_gaps)]
    to_ids = chat_prompt if request.chat else encode
    return [(to_ids(tokenizer, text), None) for text in request.prompts]


def _sample(
    model: Any,
    tokenizer: Any,
    prompts: list[tuple[list[int], list[bool] | None]],
    settings: dict[str, Any],
    num: int,
) -> Iterator[Any]:
    """`num` samples of each prompt, prompt by prompt, sample i of all with the noise of index i."""
    from retrofit.checkpoints.loading import unwritable_token_ids
    from retrofit.flexmdm.mdm_sampling import sample_mdm
    from retrofit.flexmdm.sampling import Prompt, sample_flexmdm

    repeated = [prompt for prompt in prompts for _ in range(num)]
    banned = unwritable_token_ids(tokenizer, model.config.vocab_size)
    for start in range(0, len(repeated), BATCH_SIZE):
        batch = repeated[start : start + BATCH_SIZE]
        indices = range(start, start + len(batch))
        if model.config.model_type == "flexmdm":
            yield from sample_flexmdm(
                model, [Prompt(*prompt) for prompt in batch], banned_token_ids=banned, indices=indices, **settings
            )
        else:
            yield from sample_mdm(model, [token_ids for token_ids, _ in batch], indices=indices, **settings)


def _decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _decode_runs(tokenizer: Any, token_ids: Sequence[int], kept: Sequence[bool]) -> str:
    """The text, each run of kept or written tokens decoded apart. Bytes that are not UTF-8 become U+FFFD."""
    runs = groupby(zip(kept, token_ids, strict=True), key=lambda pair: pair[0])
    return "".join(_decode(tokenizer, [index for _, index in run]) for _, run in runs)


def _print(sample: Any, text: str) -> None:
    """The text on stdout and what is known of it on stderr, so that stdout holds texts alone."""
    note = ", truncated by the length limit" if sample.truncated else ""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    print(f"-- {len(sample.token_ids)} tokens, {sample.forwards} forward passes{note}", file=sys.stderr)


def _write(rows: list[dict[str, Any]], output: Path) -> None:
    """All rows or none."""
    partial = output.with_name(output.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(partial, output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{output}: could not be written ({error.strerror or error})") from error
