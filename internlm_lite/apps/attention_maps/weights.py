"""The attention weights of a forward pass, of chosen layers and heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch

from internlm_lite.errors import ConfigError
from internlm_lite.generate.decode import check
from internlm_lite.layers.flash import Attend, packed
from internlm_lite.layers.scores import AttentionRule, in_sight, softmax_weights
from internlm_lite.models.stages import WholeModel


@torch.no_grad()
def attention_weights(
    model: WholeModel, prompts: Sequence[Sequence[int]], layers: Sequence[int], heads: Sequence[int]
) -> list[torch.Tensor]:
    """Of each prompt [layers, heads, T, T] on the CPU: row i has the weights of query i, 0 for the keys after it.

    One pass over all prompts as one packed row. The model is whole in this process. Raises DataError as `check`.
    """
    check(model, prompts)
    counts = [len(prompt) for prompt in prompts]
    boundaries, device = (0, *accumulate(counts)), model.device
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    attend = packed(model.any_stage.backend, cu_seqlens, boundaries, max(counts))
    tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    positions = torch.cat([torch.arange(count, device=device) for count in counts])
    found: dict[int, list[torch.Tensor]] = {}
    last = torch.tensor([len(tokens) - 1], device=device)
    model.logits(tokens, positions, _recording(attend, boundaries, dict.fromkeys(layers, heads), found), last)
    return [torch.stack([found[layer][number] for layer in layers]) for number in range(len(prompts))]


def _recording(
    attend: Attend, boundaries: Sequence[int], wanted: dict[int, Sequence[int]], found: dict[int, list[torch.Tensor]]
) -> Attend:
    """`attend`, which leaves the weights of the `wanted` layers' heads in `found`, document by document."""

    def attend_and_record(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if rule.layer in wanted:
            heads = list(wanted[rule.layer])
            of_group = [head * k.shape[1] // q.shape[1] for head in heads]
            found[rule.layer] = [
                weights_within(rule, q[start:stop, heads], k[start:stop, of_group]).cpu()
                for start, stop in pairwise(boundaries)
            ]
        return attend(rule, q, k, v)

    return attend_and_record


def weights_within(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q, k [T, H, D] of one document -> [H, T, T], each row of which sums to 1."""
    at = torch.arange(len(q), device=q.device)
    heads = q.transpose(0, 1).unsqueeze(1)
    return softmax_weights(rule, heads, k.transpose(0, 1), in_sight(rule, at[:, None], at)).squeeze(1)


def numbers_of(option: str, text: str | None, count: int) -> list[int]:
    """ "0,2-4" -> [0, 2, 3, 4]; None: all of `count`. Raises ConfigError for what is no such list, or not there."""
    if text is None:
        return list(range(count))
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*(\d{1,6})(?:-(\d{1,6}))?\s*", part)
        if ends is None or not int(ends[1]) <= int(ends[2] or ends[1]) < count:
            raise ConfigError(f"{option} {text}: found {part!r}, expected numbers from 0 to {count - 1}, such as 0,2-4")
        numbers += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return list(dict.fromkeys(numbers))
