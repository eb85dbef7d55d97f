"""Where a model drops: against the same model written out with explicit masks, in fp64, with all gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from internlm_lite.layers.dropout import Site, token_keys
from internlm_lite.layers.flash import AttentionBackend, packed, packed_sdpa
from internlm_lite.models.decoder import Block, Transformer
from tests.layers.test_dropout import reference
from tests.models.small import documents, row_of, small_model

P = {"embedding_dropout": 0.1, "residual_dropout": 0.2, "attention_dropout": 0.3}
SEED, STEP, ROW = 3, 5, 2
BOUNDARIES = (0, 9, 16, 24)
T = BOUNDARIES[-1]


def kept(p: float, layer: int, site: Site, features: int) -> torch.Tensor:
    """[T, features] factors, from the second implementation."""
    tokens = ROW * T + np.arange(T)[:, None]
    return torch.from_numpy(~reference(p, SEED, STEP, layer, site, tokens, np.arange(features))).double() / (1 - p)


def attended(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) with dropped weights, over the whole row at once."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    tokens, document = torch.arange(T), torch.bucketize(torch.arange(T), torch.tensor(BOUNDARIES[1:]), right=True)
    apart = tokens[:, None] - tokens
    seen = (apart >= 0) & (document[:, None] == document)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    heads, p = np.arange(q.shape[1])[:, None, None], P["attention_dropout"]
    numbers = ROW * T + np.arange(T)[:, None]
    dropped = reference(p, SEED, STEP, layer, Site.ATTENTION_WEIGHTS, numbers, apart.numpy(), heads)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1) / (1 - p) * torch.from_numpy(~dropped)
    return torch.einsum("hqk,khd->qhd", weights, v)


def written_out(model: Transformer, block: Block, x: torch.Tensor, rotary: Any) -> torch.Tensor:
    layer, p = block.attention.layer, P["residual_dropout"]
    masks = [kept(p, layer, site, x.shape[1]) for site in (Site.ATTENTION_OUTPUT, Site.FEED_FORWARD)]
    where = model.config.norms_at
    norms = (block.attention_norm, block.attention_post_norm), (block.ffn_norm, block.ffn_post_norm)

    def attention(x: torch.Tensor) -> torch.Tensor:
        return block.attention.output(attended(layer, *block.attention.project(x, rotary)))

    for part, mask, (norm, post) in zip((attention, block.feed_forward), masks, norms, strict=True):
        if where == "pre":
            x = x + part(norm(x)) * mask
        elif where == "post":
            x = norm(x + part(x) * mask)
        elif where == "reordered":
            x = x + norm(part(x)) * mask
        else:
            assert post is not None
            x = x + post(part(norm(x))) * mask
    return x


@pytest.mark.parametrize("norm_position", ["pre", "post", "reordered", "sandwich"])
def test_what_is_added_to_the_hidden_state_is_dropped_right_before(norm_position: str) -> None:
    docs = documents([b - a for a, b in pairwise(BOUNDARIES)])
    tokens, positions, labels, _ = row_of(docs)
    keys = token_keys(SEED, STEP, torch.tensor([ROW]), T)[0]
    sides = []
    for ours in (True, False):
        model = small_model(norm_position=norm_position, **P)
        if ours:
            cu_seqlens = torch.tensor(BOUNDARIES, dtype=torch.int32)
            attend = packed(AttentionBackend.SDPA, cu_seqlens, BOUNDARIES, T, model.weight_drop(keys))
            x = model.hidden(tokens, positions, attend, token_keys=keys)
        else:
            assert model.tok_embeddings is not None
            x = model.tok_embeddings(tokens, positions)
            x = x * kept(P["embedding_dropout"], 0, Site.EMBEDDING, x.shape[1])
            rotaries = model._rotations.at(positions, x.dtype, None)
            for block in model.blocks():
                x = written_out(model, block, x, rotaries[block.rotation])
            x = x if model.norm is None else model.norm(x)
        loss = model.losses(x, labels, torch.tensor(1.0, dtype=torch.float64)).scaled_sum
        loss.backward()
        sides.append({"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}})
    assert sides[0].keys() == sides[1].keys()
    for name, expected in sides[1].items():
        torch.testing.assert_close(sides[0][name], expected, rtol=1e-10, atol=1e-11, msg=name)


def test_without_keys_the_model_is_the_one_without_dropout() -> None:
    """In evaluation and generation."""
    tokens, positions, _, _ = row_of(documents([9, 15]))
    attend = packed_sdpa((0, 9, 24))
    same = [small_model(**part).hidden(tokens, positions, attend) for part in ({}, P)]
    assert torch.equal(*same)
    assert small_model(**P).weight_drop(None) is None and small_model().weight_drop(torch.zeros(2, 24)) is None
