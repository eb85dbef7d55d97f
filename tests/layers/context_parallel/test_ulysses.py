"""Ulysses between ranks against the formula over all pairs of the row."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.layers.context_parallel.ulysses import heads_sent, row_boundaries, ulysses
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import Mesh
from tests.layers.context_parallel.test_partial_attention import ROWS, T, expected, merged
from tests.layers.context_parallel.test_ring import row_of
from tests.layers.test_scores import RULES, dropped, factors_of
from tests.world import run_world

HEADS = 12
RULES_OF_LAYERS = {"plain": AttentionRule(5), "all": RULES["all"]}
BOUNDARIES = ROWS["mixed"]


def inputs_of(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(T, heads, 8) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    *qkv, weight = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.requires_grad_() for x in qkv], weight


def spans(size, rank):
    """Every second block of four tokens, as many on each rank; not in the order of the row."""
    cuts = sorted({*BOUNDARIES, *range(0, T + 1, 4)})
    document = [max(n for n, first in enumerate(BOUNDARIES[:-1]) if first <= start) for start in cuts[:-1]]
    blocks = zip(document, cuts, cuts[1:], strict=False)
    return merged([block for block in blocks if block[1] // 4 % size == rank])


def _attend(mesh: Mesh) -> dict:
    group, found = mesh.cp, {}
    row = row_of(BOUNDARIES, [spans(group.size, rank) for rank in range(group.size)], group.rank)
    assert row_boundaries(row) == BOUNDARIES
    for name, rule in RULES_OF_LAYERS.items():
        for kv_heads in (1, 2, 4, 6, 12):
            qkv, weight = inputs_of(kv_heads)
            mine = [x.detach()[row.own].requires_grad_() for x in qkv]
            for drop in (None, dropped):
                out = ulysses(row, group, AttentionBackend.SDPA, drop)(rule, *mine)
                grads = torch.autograd.grad((out * weight[row.own]).sum(), mine)
                found[name, kv_heads, drop is not None] = [row.own, out.detach(), *grads]
    return found


def test_key_heads_are_sent_no_more_often_than_it_takes():
    assert [heads_sent(kv_heads, 4) for kv_heads in (1, 2, 4, 6, 8)] == [4, 4, 4, 12, 8]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tokens_for_heads_is_the_formula_over_all_pairs(ranks):
    """Also where ranks are more than key heads, or do not divide them; dropped weights are those of the head's number
    in the whole model and of the row's tokens, so they are not alike on all ranks."""
    by_rank = run_world(_attend, ranks, context=ranks)
    at = torch.arange(T)
    for (name, kv_heads, drops), _ in by_rank[0].items():
        rule = RULES_OF_LAYERS[name]
        qkv, weight = inputs_of(kv_heads)
        factors = factors_of(rule.layer, torch.arange(HEADS).view(-1, 1, 1), at[:, None], at).double()
        exact = expected(rule, BOUNDARIES, qkv, weight, factors if drops else None)
        for found in by_rank:
            own, *ours = found[name, kv_heads, drops]
            for mine, theirs in zip(ours, exact, strict=True):
                torch.testing.assert_close(mine, theirs[own], rtol=1e-11, atol=1e-12)
