"""LLaDA's own sampler, for the MDM baseline: a window of fixed length, filled block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .noise import keyed_uniform
from .packing import pack
from .sampling import TOKEN_NOISE, Sample, Trace, check_temperature, check_token_ids, draw_tokens, evaluating


@torch.no_grad()
def sample_mdm(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    answer_length: int,
    steps: int,
    block_length: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    trace: Trace | None = None,
) -> list[Sample]:
    """LLaDA's own sampler (arXiv 2502.09992): a fixed answer of masks, block by block, low-confidence remasking.

    Each step draws a token for every mask of the current block and commits those of highest probability, evenly many at
    each step. The answer is cut at its first EOS.

    Args:
        answer_length: masks after the prompt, EOS padding included.
        steps: forward passes over all blocks; a multiple of the number of blocks.
        block_length: divides answer_length; None means one block.

    Raises:
        ValueError: lengths or steps do not divide, or prompt and answer exceed the model.
    """
    config = model.config
    block_length = answer_length if block_length is None else block_length
    check_temperature(temperature)
    for number, prompt in enumerate(prompts):
        check_token_ids(prompt, number, config.vocab_size)
    if answer_length < 1:
        raise ValueError(f"answer_length must be at least 1, found {answer_length}")
    if block_length < 1 or answer_length % block_length:
        raise ValueError(f"answer_length {answer_length} must be a positive multiple of block_length {block_length}")
    blocks = answer_length // block_length
    if steps < 1 or steps % blocks:
        raise ValueError(f"steps {steps} must be a positive multiple of the number of blocks, {blocks}")
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + answer_length > config.max_sequence_length:
        raise ValueError(
            f"a prompt of {longest} tokens and an answer of {answer_length} exceed the model's "
            f"{config.max_sequence_length} tokens"
        )
    device = getattr(model, "device", torch.device("cpu"))
    index = torch.arange(len(prompts), device=device) if indices is None else torch.tensor(indices, device=device)
    packed = pack([[*prompt, *[config.mask_token_id] * answer_length] for prompt in prompts]).to(device)
    begin = packed.cu_seqlens[1:].long() - answer_length
    banned = torch.tensor([config.mask_token_id], device=device)
    per_block = steps // blocks
    with evaluating(model):
        for step in range(steps):
            block, turn = divmod(step, per_block)
            # Positions of this block in the packed row, [B, block_length], and how many each sequence commits now.
            span = begin[:, None] + block * block_length + torch.arange(block_length, device=device)
            masked = packed.tokens[span] == config.mask_token_id
            rows = span[masked]
            quota = block_length // per_block + (turn < block_length % per_block)
            out = model(packed=packed, logit_rows=rows)
            noise = keyed_uniform(seed, index[packed.sequence_ids[rows]], TOKEN_NOISE, step, packed.positions[rows])
            tokens, probabilities = draw_tokens(out.logits, noise, temperature, banned)
            confidence = torch.full(span.shape, -torch.inf, device=device)
            confidence[masked] = probabilities.gather(1, tokens[:, None]).squeeze(1)
            best = torch.zeros_like(masked).scatter(1, confidence.topk(quota, dim=1).indices, True)
            commit = best[masked]
            packed = replace(packed, tokens=packed.tokens.index_put((rows[commit],), tokens[commit]))
            if trace is not None:
                trace(step, (step + 1) / steps, [row.tolist() for row in packed.tokens.split(packed.lengths.tolist())])
    samples = []
    for prompt, row in zip(prompts, packed.tokens.split(packed.lengths.tolist()), strict=True):
        answer = row[len(prompt) :].tolist()
        if config.eos_token_id in answer:
            answer = answer[: answer.index(config.eos_token_id)]
        samples.append(Sample([*prompt, *answer], [True] * len(prompt) + [False] * len(answer), steps, False))
    return samples
