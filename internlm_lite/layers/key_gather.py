"""Context parallelism by gathering keys and values: each rank has all that its own queries see, layer by layer.

    k, v [T / cp, Hkv, D] --all-gather--> those of all ranks --> of each piece, from the first key in sight on
    their gradients <--all-to-all, then a sum in fp32-- those of the pieces, added up in fp32 on each rank

Ranks hold only the key/value heads of their tensor-parallel part, and no head is repeated for its group of queries. The
sums over pieces and ranks have the order of tokens and ranks, so they have the same bits each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate
from typing import Any

import torch

from internlm_lite.layers.context import ContextRow, Piece, joined, numbers
from internlm_lite.layers.flash import Attend, AttentionBackend, Bounds, causal, varlen_kernel
from internlm_lite.layers.scores import AttentionRule, Drop, EqualDocuments
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group


def gathered(row: ContextRow, group: Group, backend: AttentionBackend, drop: Drop | None) -> Attend:
    """Attention of this rank's tokens of `row`: q [T / cp, H, D], k, v [T / cp, Hkv, D] -> as q. Collective over
    `group` in each call, forward and backward. `drop` is given numbers of the whole row."""
    pieces = row.pieces[row.rank]
    plans = cache(partial(_plan, row))
    within = attention_of_pieces(pieces, row.device, backend, drop)

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = _Gather.apply(k, v, group, plans(rule.window))
        return within(rule, q, keys, values)

    return attend


def attention_of_pieces(
    pieces: Sequence[Piece], device: torch.device, backend: AttentionBackend, drop: Drop | None = None
) -> Attend:
    """(rule, q [n, H, D], k, v [m, Hkv, D]) -> as q: queries of the pieces one after another, and for each piece the
    keys in front of it that it sees (`Piece.before`), then its own."""
    if backend is AttentionBackend.SDPA:
        return partial(_one_by_one, pieces, drop)
    kernel, lengths = varlen_kernel(backend), [piece.length for piece in pieces]
    queries = _bounds(lengths, device)

    @cache
    def bounds(window: int | None) -> Bounds:
        keys = [piece.before(window) + piece.length for piece in pieces]
        return Bounds(queries, _bounds(keys, device), max(lengths), max(keys))

    return lambda rule, q, k, v: kernel(bounds(rule.window), rule, q, k, v)


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """0 and the sums of the first lengths; the host does not wait for the device."""
    sums = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, pin_memory=device.type == "cuda")
    return sums.to(device, non_blocking=True)


def _one_by_one(
    pieces: Sequence[Piece], drop: Drop | None, rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """The reference."""
    lengths = [piece.length for piece in pieces]
    reach = [piece.before(rule.window) for piece in pieces]
    of_keys = [before + length for before, length in zip(reach, lengths, strict=True)]
    parts = zip(pieces, reach, q.split(lengths), k.split(of_keys), v.split(of_keys), strict=True)
    return torch.cat(
        [
            causal(rule, q, k, v, EqualDocuments(1, piece.length, piece.first + piece.start, before), drop)
            for piece, before, q, k, v in parts
        ]
    )


@dataclass(frozen=True)
class _Plan:
    """Which of the gathered keys the pieces of a rank see."""

    keys: torch.Tensor
    """[m] int64: rows of [cp, 2, T / cp], where the keys of a rank are in front of its values."""
    runs: tuple[slice, ...]
    """Parts of `keys` in which no row occurs twice, so that gradients can be added in any order."""


def _plan(row: ContextRow, window: int | None) -> _Plan:
    order = numbers([span for rank in range(row.size) for span in row.spans(rank)], row.device)
    each = row.tokens // row.size
    at = torch.arange(row.tokens, device=row.device)
    place = torch.empty_like(order)
    place[order] = at + at // each * each
    pieces = row.pieces[row.rank]
    starts = [piece.first + piece.start - piece.before(window) for piece in pieces]
    spans = [(start, piece.first + piece.stop) for start, piece in zip(starts, pieces, strict=True)]
    borders, end, last = [0], 0, 0
    for start, stop in spans:
        if start < last:  # keys that the piece before sees, too
            borders.append(end)
        end, last = end + stop - start, stop
    runs = tuple(slice(*ends) for ends in zip(borders, [*borders[1:], end], strict=True))
    return _Plan(place[numbers(joined(spans), row.device)], runs)


class _Gather(torch.autograd.Function):
    """k, v [n, Hkv, D] -> keys and values of the pieces, [m, Hkv, D] each."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, group: Group, plan: _Plan) -> Any:
        ctx.group, ctx.plan, ctx.shape = group, plan, k.shape
        full = k.new_empty(group.size, 2, *k.shape)
        full[group.rank, 0], full[group.rank, 1] = k, v
        comm.all_gather(full.view(-1), group).wait()
        rows = full.flatten(0, 2)
        return rows.index_select(0, plan.keys), rows.index_select(0, plan.keys + len(k))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group, plan, dtype = ctx.group, ctx.plan, grads[0].dtype
        wide = accumulation_dtype(dtype)
        sums = grads[0].new_zeros(group.size, 2, *ctx.shape, dtype=wide)
        rows = sums.flatten(0, 2)
        for kind, grad in enumerate(grads):
            for run in plan.runs:
                rows.index_add_(0, plan.keys[run] + kind * ctx.shape[0], grad[run].to(wide))
        sent = sums.to(dtype)
        received = torch.empty_like(sent)
        comm.all_to_all(received.view(-1), sent.view(-1), group).wait()
        k, v = received.sum(0, dtype=wide).to(dtype)
        return k, v, None, None
