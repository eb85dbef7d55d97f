"""Ring attention between ranks against the formula over all pairs of the row, and what goes around."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist

from internlm_lite.layers.context_parallel.partial_attention import ReferenceParts
from internlm_lite.layers.context_parallel.ring import ring, ring_messages
from internlm_lite.layers.context_parallel.row import ContextRow, DocumentPiece, context_row
from internlm_lite.layers.costs import Message
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import Mesh
from tests.layers.context_parallel.test_partial_attention import ROWS, T, dealt, expected
from tests.layers.test_scores import RULES, dropped, factors_of, inputs
from tests.world import run_world

CPU = torch.device("cpu")
RULES_OF_LAYERS = {"plain": AttentionRule(5), "window": RULES["window"], "all": RULES["all"]}


def row_of(boundaries, spans, rank):
    """A row whose ranks have these spans (document, start, stop)."""
    pieces = [
        tuple(DocumentPiece(n, boundaries[n], start - boundaries[n], stop - boundaries[n]) for n, start, stop in own)
        for own in spans
    ]
    return ContextRow(tuple(pieces), rank, boundaries[-1], CPU)


def _attend(mesh: Mesh, boundaries, drops: bool) -> dict:
    """Ranks have unequal numbers of tokens, and none of some documents."""
    group, drop = mesh.cp, dropped if drops else None
    row = row_of(boundaries, dealt(boundaries, group.size, 7, seed=1), group.rank)
    attend = ring(row, group, AttentionBackend.SDPA, drop)
    found = {}
    for name, rule in RULES_OF_LAYERS.items():
        for kv_heads in (4, 1):
            qkv, weight = inputs(kv_heads, tokens=T)
            mine = [x.detach()[row.own].requires_grad_() for x in qkv]
            out = attend(rule, *mine)
            assert torch.equal(out, attend(rule, *mine)), "the same bits each time"
            found[name, kv_heads] = [row.own, out.detach(), *torch.autograd.grad((out * weight[row.own]).sum(), mine)]
    return found


@pytest.mark.parametrize(("boundaries", "ranks", "drops"), [("one", 2, False), ("mixed", 3, True), ("short", 4, False)])
def test_a_ring_of_ranks_is_the_formula_over_all_pairs(boundaries, ranks, drops):
    by_rank = run_world(_attend, ranks, (ROWS[boundaries], drops), context=ranks)
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


def record(events: list, patch: pytest.MonkeyPatch) -> None:
    """What a rank begins, in its order: batches of (peer, "isend" or "irecv", elements), and computed blocks."""
    real = dist.batch_isend_irecv

    def batched(batch):
        events.append([(op.peer, op.op.__name__, op.tensor.numel()) for op in batch])
        return real(batch)

    patch.setattr(dist, "batch_isend_irecv", batched)
    for name in ("forward", "backward"):
        computed = getattr(ReferenceParts, name)
        patch.setattr(
            ReferenceParts, name, lambda *args, name=name, computed=computed: events.append(name) or computed(*args)
        )


def _recorded(mesh: Mesh, boundaries, window) -> tuple[list, list[Message]]:
    group, rule = mesh.cp, AttentionRule(window=window)
    row = context_row(boundaries, {window: 1}, group.size, group.rank, CPU)
    qkv, weight = inputs(2, tokens=boundaries[-1])
    mine = [x.detach()[row.own].requires_grad_() for x in qkv]
    events: list = []
    with pytest.MonkeyPatch.context() as patch:
        record(events, patch)
        out = ring(row, group, AttentionBackend.SDPA)(rule, *mine)
        events.append("between")
        (out * weight[row.own]).sum().backward()
    return events, ring_messages(row, window, token_bytes=2 * 2 * 8 * 8)


ROUTES = [(ROWS["one"], None), (ROWS["mixed"], None), (ROWS["one"], 7), ((0, 12, 24, 36, T), None)]


@pytest.mark.parametrize(("boundaries", "window"), ROUTES, ids=["one", "mixed", "window", "none"])
def test_what_is_sent_is_planned_and_has_one_order(boundaries, window):
    """A send and a receive are in one batch, as a send may wait for its receive; and between two ranks all messages
    have one order, as those of gradients and of keys would take each other's place."""
    by_rank = run_world(_recorded, 4, (boundaries, window), context=4)
    sent, received = Counter(), Counter()
    for rank, (events, planned) in enumerate(by_rank):
        batches = [event for event in events if isinstance(event, list)]
        assert all(len(batch) <= 2 and len({what for _, what, _ in batch}) == len(batch) for batch in batches)
        n_bytes = sum(8 * n for batch in batches for _, what, n in batch if what == "isend")
        assert n_bytes == sum(message.sent(4) for message in planned)
        order: dict = {}
        for batch in batches:
            for peer, what, n in batch:
                order.setdefault((rank, peer) if what == "isend" else (peer, rank), []).append(n)
        for pair, sizes in order.items():
            (sent if pair[0] == rank else received)[pair] = tuple(sizes)
    assert sent == received
    assert bool(sent) != (boundaries == (0, 12, 24, 36, T)), "documents that end on their rank travel nowhere"


def test_the_next_block_is_under_way_while_one_is_computed():
    """Three others' blocks there, and back with gradients in between, whose sum waits for the last only."""
    for events, _ in run_world(_recorded, 4, (ROWS["one"], None), context=4):
        kinds = ["exchange" if isinstance(event, list) else event for event in events]
        there = ["exchange", "forward"] * 3 + ["forward"]
        back = ["exchange", "backward", "exchange", "backward", "exchange", "exchange", "backward", "exchange"]
        assert kinds == [*there, "between", *back, "backward", "exchange"]
