"""Attention over parts of the keys, merged, against the formula over all pairs; ranks own any pieces of a row."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import pytest
import torch

from internlm_lite.layers.context_parallel import partial_attention
from internlm_lite.layers.context_parallel.flash_parts import FlashParts, parts_kernel, parts_problem
from internlm_lite.layers.context_parallel.kernel_calls import kernel_calls
from internlm_lite.layers.context_parallel.partial_attention import KeyBlock, Known, Mixed, ReferenceParts
from internlm_lite.layers.context_parallel.ring_parts import Part, legs_of, parts_between
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.scores import AttentionRule, in_sight
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from tests.layers.test_scores import RULES, dropped, factors_of, inputs, over_all_pairs

T = 48
ROWS = {"one": (0, T), "short": (0, 5, 12, 13, 30, 31, T), "mixed": (0, 3, 41, T)}
WINDOWS = [None, 1, 2, 7, 13, T]


def dealt(boundaries, ranks, block, seed=0):
    """Pieces of every rank: blocks of the row, cut at documents, dealt at random."""
    generator = random.Random(seed)
    cuts = sorted({*boundaries, *range(0, boundaries[-1], block)})
    pieces = [[] for _ in range(ranks)]
    for start, stop in pairwise(cuts):
        document = max(n for n, first in enumerate(boundaries[:-1]) if first <= start)
        pieces[generator.randrange(ranks)].append((document, start, stop))
    return [merged(own) for own in pieces]


def merged(pieces):
    found = []
    for document, start, stop in pieces:
        if found and found[-1][0] == document and found[-1][2] == start:
            found[-1] = (document, found[-1][1], stop)
        else:
            found.append((document, start, stop))
    return found


def numbers(pieces):
    return torch.cat([torch.arange(start, stop) for _, start, stop in pieces] or [torch.zeros(0, dtype=torch.int64)])


def of_ranges(x, ranges):
    return torch.cat([x[start:stop] for start, stop in ranges])


def pairs(part):
    """[(query, key)] of a part, by its definition."""
    (q0, q1), (k0, k1) = part.queries, part.keys
    shift = (k1 - k0) - (q1 - q0)
    for i in range(q1 - q0):
        for j in range(k1 - k0):
            before = i + shift - j
            if (before >= 0 or not part.causal) and (part.left is None or before <= part.left):
                yield q0 + i, k0 + j


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("boundaries", ROWS.values(), ids=ROWS)
def test_every_pair_in_sight_is_in_one_part_and_no_other_is(boundaries, window):
    """And no part holds a query that sees no key, for which kernels have made NaNs and illegal accesses."""
    rule = AttentionRule(window=window)
    for ranks, block in [(2, 12), (3, 5), (4, 1)]:
        pieces = dealt(boundaries, ranks, block)
        found = []
        for mine in pieces:
            for theirs in pieces:
                at, to = numbers(mine), numbers(theirs)
                for part in parts_between(mine, theirs, window):
                    own = list(pairs(part))
                    assert {q for q, _ in own} == set(range(*part.queries)), part
                    assert {k for _, k in own} == set(range(*part.keys)), part
                    found += [(int(at[q]), int(to[k])) for q, k in own]
        document = torch.bucketize(torch.arange(T), torch.tensor(boundaries[1:]), right=True)
        seen = in_sight(rule, torch.arange(T)[:, None], torch.arange(T)) & (document[:, None] == document)
        assert sorted(found) == [tuple(pair) for pair in seen.nonzero().tolist()]


@pytest.mark.parametrize("part", [Part((3, 14), (2, 20)), Part((0, 9), (4, 13), True), Part((0, 9), (4, 17), True, 5)])
def test_a_part_cut_into_smaller_ones_has_the_same_pairs(part):
    for n in (1, 2, 4, 100):
        assert [pair for one in part.cut(n) for pair in pairs(one)] == list(pairs(part))
    windowed = Part((0, 6), (0, 9), left=8)  # its first queries alone see the first keys
    assert [pair for one in windowed.cut(2) for pair in pairs(one)] == list(pairs(windowed))


@pytest.mark.parametrize("window", [None, 6])
def test_both_sides_of_an_exchange_agree_and_what_nobody_sees_stays(window):
    """Every rank works out alone what it sends: what its partner waits for. Short documents travel nowhere."""
    boundaries = (0, 4, 30, 33, T)
    pieces = dealt(boundaries, 4, 7, seed=3)
    legs = [legs_of(pieces, rank, window) for rank in range(4)]
    sends = {(rank, leg.to): leg.sent for rank in range(4) for leg in legs[rank] if leg.sent}
    waits = {(leg.source, rank): leg.tokens for rank in range(4) for leg in legs[rank] if leg.parts}
    assert sends == waits and sends
    whole = [
        [(0, 0, 12)],
        [(1, 12, 20), (2, 20, 24)],
        [(3, 24, 36)],
        [(3, 36, T)],
    ]  # the third document is on two ranks
    crossing = [[(leg.to, leg.sent) for leg in legs_of(whole, rank, window) if leg.sent] for rank in range(4)]
    assert crossing == [[], [], [(3, ((0 if window is None else 12 - window + 1, 12),))], []]


def wide(x):
    return accumulation_dtype(x.dtype)


def around_the_ring(rule, pieces, qkv, weight, drop=None, sums=None, kernel=ReferenceParts):
    """[output, gradients of q, k and v] of the row, computed rank by rank as in a ring. Gradients of keys travel in the
    dtype of the model, and are added in that of `sums`."""
    kernel = kernel(rule, drop) if drop else kernel(rule)
    out, grads = torch.zeros_like(qkv[0]), [torch.zeros_like(x, dtype=sums or wide(x)) for x in qkv]
    for rank, mine in enumerate(pieces):
        own = numbers(mine)
        if not len(own):
            continue
        q, *_ = (x.detach()[own] for x in qkv)
        legs = legs_of(pieces, rank, rule.window)
        blocks = [(own, KeyBlock(parts_between(mine, mine, rule.window), own.device, own, own))]
        for leg in legs:
            at = of_ranges(numbers(pieces[leg.source]), leg.tokens) if leg.parts else own[:0]
            blocks.append((at, KeyBlock(leg.parts, own.device, own, at)))
        mixed = Mixed.nothing(q)
        for at, block in blocks:
            assert len(at) == max((part.keys[1] for part in block.parts), default=0) or at is own
            kernel.forward(q, *(x.detach()[at] for x in qkv[1:]), block, mixed)
        out[own] = mixed.out.to(out.dtype)
        known = Known(q, out[own], weight[own], mixed.lse)
        of_q = torch.zeros_like(mixed.out)
        for at, block in blocks:
            k, v = (x.detach()[at] for x in qkv[1:])
            of_k, of_v = (torch.zeros_like(x, dtype=of_q.dtype) for x in (k, v))
            kernel.backward(known, k, v, block, (of_q, of_k, of_v))
            grads[1][at] += of_k.to(k.dtype)
            grads[2][at] += of_v.to(v.dtype)
        grads[0][own] = of_q.to(grads[0].dtype)
    return [out, *(grad.to(out.dtype) for grad in grads)]


def expected(rule, boundaries, qkv, weight, factors=None):
    out = over_all_pairs(rule, boundaries, *qkv, factors)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), qkv)]


@pytest.mark.parametrize("rule", [AttentionRule(), *RULES.values()], ids=["plain", *RULES])
@pytest.mark.parametrize("boundaries", ROWS.values(), ids=ROWS)
def test_parts_merged_are_the_formula_over_all_pairs(rule, boundaries, monkeypatch):
    for kv_heads, ranks, block, at_once in [(4, 2, 12, 2**20), (2, 3, 5, 64), (1, 4, 9, 300)]:
        monkeypatch.setattr(partial_attention, "_AT_ONCE", at_once)
        monkeypatch.setattr(partial_attention, "_FEWEST", 1)
        qkv, weight = inputs(kv_heads, tokens=T)
        ours = around_the_ring(rule, dealt(boundaries, ranks, block), qkv, weight)
        for mine, theirs in zip(ours, expected(rule, boundaries, qkv, weight), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("rule", [AttentionRule(5), RULES["all"]], ids=["plain", "all"])
def test_the_same_weights_are_dropped_as_in_one_process(rule):
    """By the numbers of the tokens in the row, not by those of a rank, whose masks would be alike on all ranks."""
    boundaries, at = ROWS["mixed"], torch.arange(T)
    factors = factors_of(rule.layer, torch.arange(4).view(-1, 1, 1), at[:, None], at).double()
    qkv, weight = inputs(tokens=T)
    ours = around_the_ring(rule, dealt(boundaries, 3, 5), qkv, weight, dropped)
    for mine, theirs in zip(ours, expected(rule, boundaries, qkv, weight, factors), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_error_does_not_grow_with_the_ring(dtype):
    """Half precision sums of sixteen hops would leave the loss as it is, and gradients three times as wrong."""
    tokens = 256
    qkv, weight = inputs(dtype=dtype, tokens=tokens)
    exact = expected(AttentionRule(), (0, tokens), [x.detach().double().requires_grad_() for x in qkv], weight.double())

    def errors(ranks, sums=None):
        pieces = [[(0, n, n + tokens // ranks)] for n in range(0, tokens, tokens // ranks)]
        ours = around_the_ring(AttentionRule(), pieces, qkv, weight, sums=sums)
        assert {x.dtype for x in ours} == {dtype}
        return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)]

    ring = {ranks: errors(ranks) for ranks in (1, 2, 4, 16)}
    for n, alone in enumerate(ring[1]):
        assert alone < 8 * torch.finfo(dtype).eps
        assert ring[16][n] < 1.1 * ring[2][n] < 2 * alone, ring  # what travels is rounded once more
    if dtype != torch.float32:
        assert max(errors(16, dtype)) > 2 * max(ring[16]), "what this test must see"


def flash_forward(q, k, v, cu_q, cu_k, *options, scale, window_size_left, window_size_right, **_):
    """What aten's kernel returns, by its documentation: windows are counted from the last tokens of a sequence."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and options[2] == 0 and all(isinstance(n, int) for n in options[:2])
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[1], len(q), dtype=accumulation_dtype(q.dtype))
    for rows, keys in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        n, m = rows[1] - rows[0], keys[1] - keys[0]
        assert 0 < n <= options[0] and 0 < m <= options[1], "kernels have failed at sequences without tokens"
        kept, values = (x[slice(*keys)].repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[slice(*rows)], kept) * scale
        ahead = torch.arange(m) - (torch.arange(n)[:, None] + m - n)
        hidden = (ahead > window_size_right) & (window_size_right >= 0)
        hidden |= (-ahead > window_size_left) & (window_size_left >= 0)
        assert not hidden.all(1).any() and options[3] == (window_size_left == -1 and window_size_right == 0)
        scores = scores.masked_fill(hidden, -torch.inf)
        lse[:, slice(*rows)] = scores.logsumexp(-1)
        out[slice(*rows)] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
    return out, lse, None, None, None


def flash_backward(grad, q, k, v, out, lse, *rest, **options):
    """With `out` and `lse` of all keys, weights are exp(score - lse)."""
    assert grad.is_contiguous() and lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        part, of_part, *_ = flash_forward(*leaves, *rest[:6], **options)
        share = (of_part.detach() - lse).exp().T.unsqueeze(-1)  # of the part in the whole
        delta = ((part.detach() - out) * grad).sum(-1, keepdim=True)
        total = (part * grad * share).sum() + (of_part.T.unsqueeze(-1) * share * delta).sum()
    return torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("rule", [AttentionRule(), RULES["window"], AttentionRule(0, 13, None, 0.3)])
@pytest.mark.parametrize("boundaries", ROWS.values(), ids=ROWS)
def test_the_calls_of_a_kernel_are_the_formula(rule, boundaries, monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    for kv_heads, ranks, block in [(4, 2, 12), (2, 3, 5), (1, 4, 9), (1, 1, T)]:
        qkv, weight = inputs(kv_heads, tokens=T)
        ours = around_the_ring(rule, dealt(boundaries, ranks, block), qkv, weight, kernel=FlashParts)
        for mine, theirs in zip(ours, expected(rule, boundaries, qkv, weight), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_a_block_takes_as_few_calls_as_a_rank_has_pieces_of_a_document():
    documents = [(n, 8 * n, 8 * n + 8) for n in range(6)]
    mine = [(n, start, start + 2) for n, start, _ in documents] + [(9, 48, 50), (9, 60, 64)]
    theirs = [(n, start + 2, stop) for n, start, stop in documents] + [(9, 50, 60)]
    assert len(kernel_calls(parts_between(mine, mine, None), torch.device("cpu"))) == 1
    assert len(kernel_calls(parts_between(theirs, mine, None), torch.device("cpu"))) == 1
    (call,) = kernel_calls(parts_between(mine, theirs, None), torch.device("cpu"))
    assert (call.queries, call.keys, call.longest) == (((14, 18),), ((36, 46),), (4, 10))


def test_a_kernel_that_is_wrong_here_gives_way_to_the_reference(monkeypatch, caplog):
    """It is compared once, forward and backward, with windows where the rule has one."""
    q = torch.zeros(3, 4, 8, dtype=torch.float64)
    kernels = partial(parts_kernel, AttentionBackend.TORCH_VARLEN, drop=None, q=q, kv_heads=2)
    parts_problem.cache_clear()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
    assert kernels(rule=AttentionRule()) == FlashParts(AttentionRule())
    assert kernels(rule=AttentionRule(window=4096)) == FlashParts(AttentionRule(window=4096))
    parts_problem.cache_clear()

    def one_key_more(*args, window_size_left, **options):
        return flash_forward(*args, window_size_left=window_size_left + (window_size_left > 0), **options)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", one_key_more)
    assert kernels(rule=AttentionRule()) == FlashParts(AttentionRule())
    for layer in (0, 1):
        assert kernels(rule=AttentionRule(layer, 4096)) == ReferenceParts(AttentionRule(layer, 4096))
    assert kernels(rule=AttentionRule(softcap=3.0)) == ReferenceParts(AttentionRule(softcap=3.0))
    assert [record.message.split(":")[0] for record in caplog.records] == ["attention in a ring"]
    assert parts_kernel(AttentionBackend.SDPA, AttentionRule(), None, q, 2) == ReferenceParts(AttentionRule())
    parts_problem.cache_clear()
