"""Ring attention between ranks against the formula over all pairs of the row, and what goes around."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from internlm_lite.layers.partial_attention import ReferenceParts
from internlm_lite.layers.ring import around, numbers_of
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import Mesh
from tests.layers.test_partial_attention import ROWS, T, dealt, expected
from tests.layers.test_scores import RULES, dropped, factors_of, inputs
from tests.world import run_world

CPU = torch.device("cpu")
RULES_OF_LAYERS = {"plain": AttentionRule(5), "window": RULES["window"], "all": RULES["all"]}


def pieces_of(boundaries, ranks):
    """Dealt; some ranks have no token of some documents."""
    return dealt(boundaries, ranks, 7, seed=1)


def _attend(mesh: Mesh, boundaries, drops: bool) -> dict:
    group, drop = mesh.dp, dropped if drops else None
    pieces = pieces_of(boundaries, group.size)
    own = numbers_of(pieces[group.rank], None, CPU)
    attend = around(pieces, group, CPU, numbered=drops)
    found = {}
    for name, rule in RULES_OF_LAYERS.items():
        for kv_heads in (4, 1):
            qkv, weight = inputs(kv_heads, tokens=T)
            mine = [x.detach()[own].requires_grad_() for x in qkv]
            out = attend(ReferenceParts(rule, drop), rule, *mine)
            found[name, kv_heads] = [own, out.detach(), *torch.autograd.grad((out * weight[own]).sum(), mine)]
    return found


@pytest.mark.parametrize(("boundaries", "ranks", "drops"), [("one", 2, False), ("mixed", 3, True), ("short", 4, False)])
def test_a_ring_of_ranks_is_the_formula_over_all_pairs(boundaries, ranks, drops):
    by_rank = run_world(partial(_attend, boundaries=ROWS[boundaries], drops=drops), ranks)
    at = torch.arange(T)
    for (name, kv_heads), _ in by_rank[0].items():
        rule = RULES_OF_LAYERS[name]
        factors = factors_of(rule.layer, torch.arange(4).view(-1, 1, 1), at[:, None], at).double() if drops else None
        qkv, weight = inputs(kv_heads, tokens=T)
        exact = expected(rule, ROWS[boundaries], qkv, weight, factors)
        seen = 0
        for found in by_rank:
            own, *ours = found[name, kv_heads]
            seen += len(own)
            for mine, theirs in zip(ours, exact, strict=True):
                torch.testing.assert_close(mine, theirs[own], rtol=1e-11, atol=1e-12)
        assert seen == T
