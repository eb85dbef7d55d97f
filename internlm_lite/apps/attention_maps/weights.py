"""The attention weights of a forward pass, of chosen layers and heads.

    encoder   [layers, heads, S, S]   of source tokens to each other
    decoder   [layers, heads, T, T]   row i has the weights of query i, 0 for the keys after it
    cross     [layers, heads, T, S]   of target tokens to the source

A decoder alone has "decoder" alone. Layers are numbered from 0 on each side.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from internlm_lite.apps.attention_maps.write_maps import Maps, check_size
from internlm_lite.errors import ConfigError
from internlm_lite.generate.decode import check
from internlm_lite.generate.request import Request
from internlm_lite.generate.source_cache import source_row
from internlm_lite.layers.flash import Attend, packed
from internlm_lite.layers.scores import AttentionRule, in_sight, softmax_weights
from internlm_lite.models.stages import WholeModel

Recorded = dict[int, list[torch.Tensor]]
"""Layer of the whole model -> of each document the weights [heads, queries, keys]."""


@torch.no_grad()
def attention_weights(
    model: WholeModel, requests: Sequence[Request], layers: Sequence[int], heads: Sequence[int]
) -> list[dict[str, torch.Tensor]]:
    """Of the prompt and the source of each request, on the CPU; a side has those of `layers` that are there.

    One pass over all prompts as one packed row. The model is whole in this process. Raises DataError as `check`.
    """
    check(model, requests)
    counts, device, config = [len(request.prompt) for request in requests], model.device, model.any_stage.config
    boundaries = (0, *accumulate(counts))
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    attend = packed(model.any_stage.backend, cu_seqlens, boundaries, max(counts))
    tokens = torch.tensor([token for request in requests for token in request.prompt], device=device)
    positions = torch.cat([torch.arange(count, device=device) for count in counts])
    last = torch.tensor([len(tokens) - 1], device=device)
    before = config.num_encoder_layers  # layers in the numbering of the whole model
    of_encoder = {layer: heads for layer in layers if layer < before}
    of_decoder = {before + layer: heads for layer in layers if layer < config.num_layers}
    found: dict[str, Recorded] = {"decoder": {}}
    attend = _recording(attend, of_decoder, boundaries, boundaries, found["decoder"])
    source = None
    if before:
        sources = [request.source for request in requests]
        found = {"encoder": {}, **found, "cross": {}}
        ends, row = (0, *accumulate(map(len, sources))), source_row(model.any_stage.backend, sources, counts, device)
        inside = _recording(row.attend, of_encoder, ends, ends, found["encoder"])
        across = _recording(row.attend_across, of_decoder, boundaries, ends, found["cross"])
        source = replace(row, attend=inside, attend_across=across)
    model.logits(tokens, positions, attend, last, source=source)
    wanted = {"encoder": of_encoder, "decoder": of_decoder, "cross": of_decoder}
    return [
        {side: torch.stack([of[layer][number] for layer in wanted[side]]) for side, of in found.items() if of}
        for number in range(len(requests))
    ]


def _recording(
    attend: Attend,
    wanted: dict[int, Sequence[int]],
    queries: Sequence[int],
    keys: Sequence[int],
    found: Recorded,
) -> Attend:
    """`attend`, which leaves the weights of the `wanted` layers' heads in `found`, document by document."""

    def attend_and_record(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if rule.layer in wanted:
            heads = list(wanted[rule.layer])
            of_group = [head * k.shape[1] // q.shape[1] for head in heads]
            found[rule.layer] = [
                weights_within(rule, q[slice(*own), heads], k[slice(*other), of_group]).cpu()
                for own, other in zip(pairwise(queries), pairwise(keys), strict=True)
            ]
        return attend(rule, q, k, v)

    return attend_and_record


def weights_within(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q [T, H, D], k [S, H, D] of one document -> [H, T, S], each row of which sums to 1."""
    at, keys = (torch.arange(len(x), device=x.device) for x in (q, k))
    heads = q.transpose(0, 1).unsqueeze(1)
    return softmax_weights(rule, heads, k.transpose(0, 1), in_sight(rule, at[:, None], keys)).squeeze(1)


def maps_of(
    model: WholeModel,
    request: Request,
    labels: Mapping[str, Sequence[str]],
    layers: Sequence[int],
    heads: Sequence[int],
    suffix: str,
) -> list[Maps]:
    """The maps of all sides for a file of this kind. `labels`: of the tokens of the "prompt" and of the "source".

    Raises as `attention_weights`; ConfigError, before anything is computed, for more than the file can show."""
    config = model.any_stage.config
    source, target, title = labels["source"], labels["prompt"], config.num_encoder_layers > 0
    sides = {
        "encoder": (source, source, config.num_encoder_layers),
        "decoder": (target, None, config.num_layers),
        "cross": (target, source, config.num_layers * title),
    }
    groups = {}
    for side, (rows, columns, count) in sides.items():
        if there := [layer for layer in layers if layer < count]:
            shape = len(there), len(heads), len(rows), len(rows if columns is None else columns)
            groups[side] = Maps(rows, there, heads, torch.empty(shape, device="meta"), columns, side * title)
    check_size(suffix, list(groups.values()))
    weights = attention_weights(model, [request], layers, heads)[0]
    return [replace(maps, weights=weights[side]) for side, maps in groups.items()]


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
