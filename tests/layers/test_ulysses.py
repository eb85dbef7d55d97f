"""Ulysses between ranks against the formula over all pairs of the row."""

from __future__ import annotations

import pytest
import torch

from internlm_lite.layers.flash import packed_sdpa
from internlm_lite.layers.ring import numbers_of
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.layers.ulysses import Exchange, heads_sent, of_heads_from
from internlm_lite.mesh.mesh import Mesh
from tests.layers.test_partial_attention import ROWS, T, expected
from tests.layers.test_ring import CPU
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
    return [(0, start, start + 4) for start in range(4 * rank, T, 4 * size)]


def _attend(mesh: Mesh) -> dict:
    group, found = mesh.dp, {}
    own = numbers_of(spans(group.size, group.rank), None, CPU)
    exchange = Exchange(
        torch.cat([numbers_of(spans(group.size, rank), None, CPU) for rank in range(group.size)]), group
    )
    drop = of_heads_from(group.rank * HEADS // group.size, dropped)
    for name, rule in RULES_OF_LAYERS.items():
        for kv_heads in (1, 2, 4, 6, 12):
            qkv, weight = inputs_of(kv_heads)
            mine = [x.detach()[own].requires_grad_() for x in qkv]
            for how in (None, drop):
                of_heads = exchange.to_heads(*mine)
                assert [x.shape[1] for x in of_heads[1:]] == [heads_sent(kv_heads, group.size) // group.size] * 2
                out = exchange.to_tokens(packed_sdpa(BOUNDARIES, how)(rule, *of_heads))
                grads = torch.autograd.grad((out * weight[own]).sum(), mine)
                found[name, kv_heads, how is not None] = [own, out.detach(), *grads]
    return found


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tokens_for_heads_is_the_formula_over_all_pairs(ranks):
    """Also where ranks are more than key heads, or do not divide them; dropped weights are those of the head's number
    in the whole model and of the row's tokens, so they are not alike on all ranks."""
    by_rank = run_world(_attend, ranks)
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
