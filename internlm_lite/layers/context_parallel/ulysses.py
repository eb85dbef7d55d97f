"""Context parallelism over heads (DeepSpeed-Ulysses, arXiv:2309.14509): ranks exchange tokens for heads.

    own tokens, all heads [T / k, H, D] -- all-to-all --> all tokens, own heads [T, H / k, D]      q, k and v in one
    attention over the whole row by whatever kernel, with its own documents, windows, caps and dropped weights
    [T, H / k, D] -- all-to-all --> [T / k, H, D]

Heads are those of this tensor-parallel rank; k divides them. Where k does not divide the key/value heads, each is sent
as often as it takes: a rank gets those that its query heads belong to; gradients are summed in the dtype of sums.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import torch

from internlm_lite.layers.context_parallel.kernel_calls import sequence_boundaries
from internlm_lite.layers.context_parallel.row import ContextRow, numbers
from internlm_lite.layers.flash import Attend, AttentionBackend, packed
from internlm_lite.layers.scores import AttentionRule, Drop
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def ulysses(row: ContextRow, group: Group, backend: AttentionBackend, drop: Drop | None = None) -> Attend:
    """Attention of this rank's tokens, [T / k, H, D], over those of all ranks of `group`. Collective over `group`.

    `drop`: by numbers of tokens in the row and of heads of this tensor-parallel rank, as layers/flash.py:packed takes
    it. Does not read the device."""
    boundaries = row_boundaries(row)
    on_device = sequence_boundaries([stop - start for start, stop in pairwise(boundaries)], row.device)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    exchange = HeadsForTokens(torch.cat([numbers(row.spans(rank), row.device) for rank in range(row.size)]), group)

    @cache
    def packed_from(first_head: int) -> Attend:
        """Of heads that begin with number `first_head` of this tensor-parallel rank."""
        shifted = None if drop is None else of_heads_from(first_head, drop)
        return packed(backend, on_device, boundaries, longest, shifted)

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        attend_whole = packed_from(group.rank * q.shape[1] // group.size)
        return exchange.to_tokens(attend_whole(rule, *exchange.to_heads(q, k, v)))

    return attend


def row_boundaries(row: ContextRow) -> tuple[int, ...]:
    """0, document ends ..., T. Documents without tokens are left out."""
    ends: dict[int, int] = {}
    for piece in (piece for pieces in row.pieces for piece in pieces):
        ends[piece.document] = max(ends.get(piece.document, 0), piece.first + piece.stop)
    return (0, *sorted(ends.values()))


class HeadsForTokens:
    """Of one row. `order` [T] int64: the numbers in the row of the tokens of all ranks, rank by rank."""

    def __init__(self, order: torch.Tensor, group: Group) -> None:
        self.order, self.group = order, group

    @cached_property
    def _places(self) -> torch.Tensor:
        """Of each token of the row in `order`."""
        return torch.empty_like(self.order).scatter_(
            0, self.order, torch.arange(len(self.order), device=self.order.device)
        )

    def to_heads(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Three:
        """q [T / k, H, D], k, v [T / k, Hkv, D] -> [T, H / k, D], [T, h, D], [T, h, D]; see `heads_sent`."""
        found: Three = _ToHeads.apply(q, k, v, self)
        return found

    def to_tokens(self, mixed: torch.Tensor) -> torch.Tensor:
        """[T, H / k, D] -> [T / k, H, D]"""
        found: torch.Tensor = _ToTokens.apply(mixed, self)
        return found

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """[T / k, k, h, D] -> [T, h, D]: index k of the own tokens goes to rank k. Collective."""
        received = self._swapped(x.movedim(1, 0).contiguous())
        return received.flatten(0, 1).index_select(0, self._places)

    def collect(self, x: torch.Tensor) -> torch.Tensor:
        """The way back: [T, h, D] -> [T / k, k, h, D]. Collective."""
        sent = x.index_select(0, self.order).unflatten(0, (self.group.size, -1))
        return self._swapped(sent).movedim(0, 1)

    def _swapped(self, blocks: torch.Tensor) -> torch.Tensor:
        """Contiguous; block i goes to rank i."""
        received = torch.empty_like(blocks)
        comm.all_to_all(received.view(-1), blocks.view(-1), self.group).wait()
        return received


def heads_sent(kv_heads: int, size: int) -> int:
    """Key heads that a rank sends, copies included: the least number that both divide. It divides the query heads."""
    return math.lcm(kv_heads, size)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, exchange: HeadsForTokens) -> Three:
        size = exchange.group.size
        ctx.exchange, ctx.copies = exchange, heads_sent(k.shape[1], size) // k.shape[1]
        k, v = (x.repeat_interleave(ctx.copies, dim=1) if ctx.copies > 1 else x for x in (k, v))
        parts = [x.unflatten(1, (size, -1)) for x in (q, k, v)]
        ctx.heads = [part.shape[2] for part in parts]
        q, k, v = exchange.spread(torch.cat(parts, dim=2)).split(ctx.heads, dim=1)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        parts = ctx.exchange.collect(torch.cat(grads, dim=1)).split(ctx.heads, dim=2)
        of_q, of_k, of_v = (part.flatten(1, 2) for part in parts)
        return of_q, _summed(of_k, ctx.copies), _summed(of_v, ctx.copies), None


def _summed(x: torch.Tensor, copies: int) -> torch.Tensor:
    """Gradients of copies of a head, [n, heads * copies, D] -> [n, heads, D]."""
    if copies == 1:
        return x
    return x.unflatten(1, (-1, copies)).sum(2, dtype=accumulation_dtype(x.dtype)).to(x.dtype)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: torch.Tensor, exchange: HeadsForTokens) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.collect(mixed).flatten(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.exchange.spread(grads[0].unflatten(1, (ctx.exchange.group.size, -1))), None


def of_heads_from(first: int, drop: Drop) -> Drop:
    """`drop` for heads that are numbered from 0 but are those of this tensor-parallel rank from number `first` on."""

    def shifted(
        layer: int, weights: torch.Tensor, heads: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        return drop(layer, weights, heads + first, queries, keys)

    return shifted
