"""Continues prompts: one packed forward pass over all prompts, then one token per sequence and step."""

from __future__ import annotations

from itertools import accumulate

import torch

from internlm_lite.errors import DataError
from internlm_lite.generate.cache import KVCache
from internlm_lite.generate.sample import Sampler, Sampling
from internlm_lite.layers.flash import packed
from internlm_lite.mesh import comm
from internlm_lite.models.stages import WholeModel


@torch.no_grad()
def generate(
    model: WholeModel, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling, eos: int | None
) -> list[list[int]]:
    """The continuation of each prompt, without the prompt: it ends before `eos` or after `max_new_tokens` tokens.

    Collective over tp and pp: same arguments and result on every rank. Reads the device once per token. Raises
    DataError for a prompt that is empty or contains an id outside the vocabulary.
    """
    check(model, prompts)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(len(prompts), max(lengths) + max_new_tokens, model.device)
    draw = Sampler(sampling, cache.lengths.device)
    new_tokens: list[list[int]] = [[] for _ in prompts]
    running = set(range(len(prompts)))

    logits = _prefill(model, prompts, cache)
    for step in range(max_new_tokens):
        drawn = draw(logits)
        for row, token in enumerate(comm.read(drawn)):
            if token == eos:
                running.discard(row)
            elif row in running:
                new_tokens[row].append(token)
        if not running or step + 1 == max_new_tokens:
            break
        logits = model.logits(drawn, cache.lengths, cache.decode())
        cache.advance()
    return new_tokens


def check(model: WholeModel, prompts: list[list[int]]) -> None:
    """Raises DataError for a prompt that is empty or contains an id outside the vocabulary."""
    vocab_size = model.any_stage.config.vocab_size
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {number} is empty: expected at least one token, for instance the tokenizer's BOS")
        wrong = [token for token in prompt if not 0 <= token < vocab_size]
        if wrong:
            raise DataError(
                f"prompt {number} holds token id {wrong[0]}: expected 0..{vocab_size - 1}; "
                "use the tokenizer that the model was trained with"
            )


def _prefill(model: WholeModel, prompts: list[list[int]], cache: KVCache) -> torch.Tensor:
    """Logits [B, vocab] of each prompt's last token."""
    device = cache.lengths.device
    lengths = [len(prompt) for prompt in prompts]
    boundaries = (0, *accumulate(lengths))
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(length, device=device) for length in lengths])
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    attend = packed(model.any_stage.backend, cu_seqlens, boundaries, max(lengths))
    return model.logits(tokens, positions, cache.prefill(lengths, attend), rows=cu_seqlens[1:].long() - 1)
