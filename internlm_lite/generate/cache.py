"""KV cache: keys and values of earlier tokens, so that a new token costs a forward pass over one position.

extend    a packed row of the next tokens of every sequence, any number each: prompts, whole or in chunks
decode    one new token per sequence; sequence b attends to its own lengths[b] + 1 positions
select    keeps some sequences, in any order and number: beams follow their parents, ended sequences go
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from internlm_lite.layers.flash import Attend
from internlm_lite.layers.scores import AttentionRule, in_sight, softmax_weights, weighted_values

_GROWTH = 512
"""Fewest positions that are added at a time: not all that a text may have, which most texts do not reach."""


@dataclass(frozen=True)
class _Store:
    """Keys and values [batch, n, Hkv, D] of a layer at the positions `first` .. `first` + n - 1."""

    first: int
    keys: torch.Tensor
    values: torch.Tensor

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> _Store:
        return _Store(self.first, change(self.keys), change(self.values))

    def between(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the positions `start` .. `stop` - 1."""
        part = slice(start - self.first, stop - self.first)
        return self.keys[:, part], self.values[:, part]


class KVCache:
    """For `batch` sequences of at most `capacity` tokens. After the forward pass of `extend` or `decode`, `advance`.

    A rank stores only the layers and heads that it computes.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._known = [0] * batch  # the same on the host
        self._capacity = capacity
        self._stores: dict[int, _Store] = {}  # by layer

    def extend(self, counts: Sequence[int], packed: Attend) -> Attend:
        """Attention of a packed row of counts[b] new tokens of each sequence; stores their keys and values.

        `packed`: attention within the pieces of the row, which is all there is while the cache is empty.
        """
        known = list(self._known)

        def attend_to_all(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            stop = max(start + count for start, count in zip(known, counts, strict=True))
            store = self._reserve(rule, stop, k, v)
            for rows, new in ((store.keys, k), (store.values, v)):
                for row, start, piece in zip(rows, known, new.split(list(counts)), strict=True):
                    row[start - store.first : start - store.first + len(piece)] = piece
            if not any(known):
                return packed(rule, q, k, v)
            return torch.cat([self._attend_alone(rule, b, piece) for b, piece in enumerate(q.split(list(counts)))])

        return attend_to_all

    def _reserve(self, rule: AttentionRule, stop: int, k: torch.Tensor, v: torch.Tensor) -> _Store:
        """The store of a layer, with room up to position `stop`. Where it must grow, it leaves out what is behind the
        window of every sequence."""
        batch = len(self._known)
        old = self._stores.get(rule.layer) or _Store(0, *(x.new_zeros(batch, 0, *x.shape[1:]) for x in (k, v)))
        if old.first + old.keys.shape[1] < stop:
            first = _first_seen(rule, min(self._known))
            kept = _Store(first, old.keys[:, first - old.first :], old.values[:, first - old.first :])
            size = min(self._capacity - first, max(2 * kept.keys.shape[1], stop - first + _GROWTH))
            self._stores[rule.layer] = old = kept.each(lambda x: _grown(x, size))
        return old

    def _attend_alone(self, rule: AttentionRule, b: int, q: torch.Tensor) -> torch.Tensor:
        """The queries [n, H, D] of the newest n tokens of sequence b, over all its tokens up to their own."""
        known = self._known[b]
        first, stop = _first_seen(rule, known), known + len(q)
        at = torch.arange(first, stop, device=q.device)
        keys, values = (x[b].transpose(0, 1) for x in self._stores[rule.layer].between(first, stop))
        seen = in_sight(rule, at[known - first :, None], at)  # is_causal would align first query and first key
        return attend_where(rule, q.transpose(0, 1), keys, values, seen).transpose(0, 1)

    def decode(self) -> Attend:
        """Attention of one new token per sequence (q [B, H, D]) over the cached tokens and itself; stores its k, v."""
        rows, stop = torch.arange(len(self._known), device=self.lengths.device), max(self._known) + 1
        masks: dict[int | None, torch.Tensor] = {}  # [B, 1, 1, n] by window

        def attend_to_cache(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            store, first = self._reserve(rule, stop, k, v), _first_seen(rule, min(self._known))
            store.keys[rows, self.lengths - store.first] = k
            store.values[rows, self.lengths - store.first] = v
            if rule.window not in masks:
                seen = in_sight(rule, self.lengths.unsqueeze(1), torch.arange(first, stop, device=q.device))
                masks[rule.window] = seen[:, None, None]
            keys, values = (x.transpose(1, 2) for x in store.between(first, stop))
            return attend_where(rule, q.unsqueeze(2), keys, values, masks[rule.window]).squeeze(2)

        return attend_to_cache

    def advance(self, counts: Sequence[int] | None = None) -> None:
        """Count the tokens of the last `extend`, or with None of the last `decode`, in `lengths`."""
        if counts is None:
            self._known, self.lengths = [known + 1 for known in self._known], self.lengths + 1
        else:
            self._known = [known + count for known, count in zip(self._known, counts, strict=True)]
            self.lengths = torch.tensor(self._known, device=self.lengths.device)

    def select(self, parents: Sequence[int]) -> None:
        """Sequence b becomes a copy of sequence parents[b]; the number of sequences may change."""
        if list(parents) == list(range(len(self._known))):
            return
        index = torch.tensor(parents, device=self.lengths.device)
        for layer, store in self._stores.items():
            self._stores[layer] = store.each(lambda x: x.index_select(0, index))
        self._known = [self._known[parent] for parent in parents]
        self.lengths = self.lengths[index]


def _first_seen(rule: AttentionRule, query: int) -> int:
    """The first position that the query at this one sees."""
    return 0 if rule.window is None else max(0, query + 1 - rule.window)


def _grown(rows: torch.Tensor, size: int) -> torch.Tensor:
    """With zeros behind, because 0 * a masked NaN would be NaN."""
    return torch.cat([rows, rows.new_zeros(len(rows), size - rows.shape[1], *rows.shape[2:])], dim=1)


def attend_where(
    rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """q [.., H, n, D], k, v [.., Hkv, m, D], seen that broadcasts to [.., H, n, m] -> as q."""
    if rule.softcap is None:
        grouped = q.shape[-3] != k.shape[-3]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=rule.scale, enable_gqa=grouped)
    q = q.unflatten(-3, (k.shape[-3], -1))
    mixed = weighted_values(softmax_weights(rule, q, k, seen.unsqueeze(-3)), v)
    return mixed.to(v.dtype).flatten(-4, -3)
