"""Samples written while training, with the settings they were drawn with."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from retrofit.data.templates import chat_prompt, encode
from retrofit.flexmdm.mdm_sampling import sample_mdm
from retrofit.flexmdm.sampling import Prompt, sample_flexmdm
from retrofit.sections import Recipe


def encode_prompts(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[list[int]]:
    """Token ids of the recipe's prompts.

    Raises:
        ValueError: a prompt leaves no room in the window.
    """
    window = recipe.objective.window
    to_ids = chat_prompt if recipe.sampling.chat else encode
    prompts = [to_ids(tokenizer, text) for text in recipe.sampling.prompts]
    for text, token_ids in zip(recipe.sampling.prompts, prompts, strict=True):
        if len(token_ids) >= window:
            raise ValueError(
                f"sampling.prompts: {text[:40]!r} has {len(token_ids)} tokens, the window {window}; shorten it"
            )
    return prompts


def draw_samples(model: Any, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> list[dict[str, Any]]:
    """One record a prompt: settings, prompt, text, token ids.

    The noise is keyed by the recipe's seed, the same at every step, so that samples of different steps can be compared.
    """
    section, window = recipe.sampling, recipe.objective.window
    prompts, seed = encode_prompts(tokenizer, recipe), recipe.training.seed
    settings: dict[str, Any] = {"steps": section.steps, "temperature": section.temperature, "seed": seed}
    if recipe.objective.name == "flexmdm":
        settings |= {"order": section.order, "counts": "binomial", "max_length": window}
        samples = sample_flexmdm(model, [Prompt(token_ids) for token_ids in prompts], **settings)
        settings["schedules"] = model.config.schedules.to_dict()
    else:
        settings["answer_length"] = window - max(map(len, prompts))
        samples = sample_mdm(model, prompts, **settings)
    return [
        {
            "prompt": prompt,
            "text": tokenizer.decode(sample.token_ids),
            "token_ids": sample.token_ids,
            "truncated": sample.truncated,
            "sampling": settings,
        }
        for prompt, sample in zip(section.prompts, samples, strict=True)
    ]
