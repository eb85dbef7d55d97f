"""Attention that no kernel computes: sliding windows, capped scores, dropped weights. Exact, on every device and dtype.

    scores q k^T -> * scale -> softcap -> mask -> softmax -> * drop -> values

of a block of queries and the keys in their reach at a time, so that the work is that of the window, and no matrix of
all pairs exists. The backward pass computes a block again: only q, k and v are kept for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.tensor_parallel import accumulation_dtype

Drop = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer, weights, heads of this rank, tokens of the queries, tokens of the keys) -> the weights that dropout leaves.

The last three tensors are numbers from 0, tokens those of the row; they broadcast to the shape of the weights. Called
in the forward pass and again in the backward pass: the same numbers must drop the same weights."""

_AT_ONCE = 2**20
"""Scores of a block: 4 MiB in fp32."""
_FEWEST = 16
"""Queries of a block."""


@dataclass(frozen=True)
class AttentionRule:
    """How the queries of one layer look at keys of their document. The defaults are causal attention."""

    layer: int = 0
    """Number in the whole model."""
    window: int | None = None
    """A query sees so many tokens: its own and those before it; unless causal, as many behind it, too."""
    softcap: float | None = None
    """c: a score s becomes c * tanh(s / c)."""
    scale: float | None = None
    """Of q k^T; None: head_dim ** -0.5."""
    causal: bool = True
    """A query sees no token behind its own."""


def attention_rule(config: ModelConfig, layer: int) -> AttentionRule:
    """The rule of layer number `layer` of the model."""
    causal, cap, scale = not config.in_encoder(layer), config.attention_softcap, config.attention_scale
    return AttentionRule(layer, config.window(layer), cap, scale, causal)


def across_rule(config: ModelConfig, layer: int) -> AttentionRule:
    """The rule by which layer number `layer`, of the decoder, looks at its source: at all of it."""
    return AttentionRule(layer, None, config.attention_softcap, config.attention_scale, causal=False)


def in_sight(rule: AttentionRule, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Whether a query at one position sees the key at another of its document; the two broadcast."""
    distance = queries - keys
    if not rule.causal:
        return distance.abs() < (math.inf if rule.window is None else rule.window)
    return distance >= 0 if rule.window is None else (distance >= 0) & (distance < rule.window)


def capped_scores(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Of the g query heads of each key head: q [.., g, n, D], k [.., m, D] -> [.., g, n, m] in the dtype of sums,
    without a mask."""
    wide = accumulation_dtype(q.dtype)
    scores = of_groups(q.to(wide) * scale_of(rule, q.shape[-1]), k.to(wide).mT)
    return scores if rule.softcap is None else rule.softcap * torch.tanh(scores / rule.softcap)


def scale_of(rule: AttentionRule, head_dim: int) -> float:
    """Of q k^T."""
    return float(head_dim**-0.5) if rule.scale is None else rule.scale


def softmax_weights(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`capped_scores` where `seen`, which broadcasts, is true -> weights, whose rows sum to 1."""
    return capped_scores(rule, q, k).masked_fill(~seen, -math.inf).softmax(dim=-1)


def weighted_values(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """weights [.., g, n, m], v [.., m, D] -> [.., g, n, D], in the dtype of `weights`."""
    return of_groups(weights, v.to(weights.dtype))


def of_groups(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """[.., g, n, a] times [.., a, b]: all heads of a group in one product, so that the matrix is not repeated."""
    return (rows.flatten(-3, -2) @ matrix).unflatten(-2, rows.shape[-3:-1])


@dataclass(frozen=True)
class EqualDocuments:
    """Neighbouring documents of one length in a row, or the last tokens of one document."""

    count: int
    length: int
    start: int
    """The first token's number in the row."""
    before: int = 0
    """How many keys more than queries each document has. Of causal attention: of one document, keys in front of the
    first token, which it sees, too; with a window not more than it reaches."""


def attend_in_blocks(
    rule: AttentionRule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    docs: EqualDocuments,
    drop: Drop | None = None,
) -> torch.Tensor:
    """Attention within each of `docs`: q [count * length, H, D], k, v [count * (before + length), Hkv, D] -> as q."""
    q = q.unflatten(1, (k.shape[1], -1))  # [T, Hkv, g, D]
    mixed: torch.Tensor = _InBlocks.apply(q, k.unsqueeze(2), v.unsqueeze(2), _Blocks(rule, docs, drop))
    return mixed.flatten(1, 2)


@dataclass(frozen=True)
class _Blocks:
    rule: AttentionRule
    docs: EqualDocuments
    drop: Drop | None

    def __call__(self, heads: int) -> Iterator[tuple[slice, slice]]:
        """(queries, keys in their reach) of each block; numbers among those of a document."""
        length, before, window = self.docs.length, self.docs.before, self.rule.window
        keys = before + length
        n = max(_AT_ONCE // (self.docs.count * heads * min(keys, 2 * (window or keys))), _FEWEST)
        n = n if window is None else min(n, max(window, _FEWEST))
        for start in range(0, length, n):
            stop = min(start + n, length)
            first = 0 if window is None else max(0, before + start - window + 1)
            last = keys if window is None else min(keys, before + stop + window - 1)
            yield slice(start, stop), slice(first, before + stop if self.rule.causal else last)

    def mix(self, block: tuple[slice, slice], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """The values of one block: q [count, Hkv, g, n, D], k, v [count, Hkv, 1, m, D] -> as q."""
        before = self.docs.before
        queries = torch.arange(block[0].start, block[0].stop, device=q.device)
        keys = torch.arange(block[1].start - before, block[1].stop - before, device=q.device)
        weights = softmax_weights(self.rule, q, k.squeeze(2), in_sight(self.rule, queries[:, None], keys))
        if self.drop is not None:
            first = self.docs.start + self.docs.length * torch.arange(self.docs.count, device=q.device)
            first = first.view(-1, 1, 1, 1, 1)
            heads = torch.arange(q.shape[1] * q.shape[2], device=q.device).view(-1, q.shape[2], 1, 1)
            weights = self.drop(self.rule.layer, weights, heads, first + queries[:, None], first + keys)
        return weighted_values(weights, v.squeeze(2))


class _InBlocks(torch.autograd.Function):
    """q [count * length, Hkv, g, D], k, v [count * (before + length), Hkv, 1, D] -> as q."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: _Blocks) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.blocks = blocks
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        views = [_by_document(x, blocks.docs) for x in (q, k, v)]
        for block in blocks(q.shape[1] * q.shape[2]):
            _by_document(out, blocks.docs)[..., block[0], :] = blocks.mix(block, *_parts(views, block))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        blocks, inputs = ctx.blocks, ctx.saved_tensors
        q = inputs[0]
        *views, grad = (_by_document(x, blocks.docs) for x in (*inputs, *grads))
        sums = [torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in inputs]
        totals = [_by_document(x, blocks.docs) for x in sums]
        for block in blocks(q.shape[1] * q.shape[2]):
            # In the dtype of sums, in which the gradients of a key from several blocks are added.
            leaves = [x.to(sums[0].dtype, copy=True).requires_grad_() for x in _parts(views, block)]
            with torch.enable_grad():
                mixed = blocks.mix(block, *leaves)
            own = torch.autograd.grad(mixed, leaves, grad[..., block[0], :].to(mixed.dtype))
            for total, part in zip(_parts(totals, block), own, strict=True):
                total += part
        return *(total.to(x.dtype) for total, x in zip(sums, inputs, strict=True)), None


def _by_document(x: torch.Tensor, docs: EqualDocuments) -> torch.Tensor:
    """[count * n, Hkv, g, D] -> [count, Hkv, g, n, D], a view."""
    return x.unflatten(0, (docs.count, -1)).movedim(1, 3)


def _parts(views: list[torch.Tensor], block: tuple[slice, slice]) -> list[torch.Tensor]:
    """Of q, k and v."""
    queries, keys = block
    return [x[..., part, :] for x, part in zip(views, (queries, keys, keys), strict=True)]
