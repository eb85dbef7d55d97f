"""KV cache: keys and values of earlier tokens, so that a new token costs a forward pass over one position.

extend    a packed row of the next tokens of every sequence, any number each: prompts, whole or in chunks
decode    one new token per sequence; sequence b attends to its own lengths[b] + 1 positions
select    keeps some sequences, in any order and number: beams follow their parents, ended sequences go
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from internlm_lite.layers.flash import Attend

_GROWTH = 512
"""Fewest positions that are added at a time: not all that a text may have, which most texts do not reach."""


class KVCache:
    """For `batch` sequences of at most `capacity` tokens. After the forward pass of `extend` or `decode`, `advance`.

    A rank stores only the layers and heads that it computes.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._known = [0] * batch  # the same on the host
        self._capacity = capacity
        self._keys: dict[int, torch.Tensor] = {}  # layer -> [batch, capacity, Hkv, D]
        self._values: dict[int, torch.Tensor] = {}

    def extend(self, counts: Sequence[int], packed: Attend) -> Attend:
        """Attention of a packed row of counts[b] new tokens of each sequence; stores their keys and values.

        `packed`: attention within the pieces of the row, which is all there is while the cache is empty.
        """
        known = list(self._known)

        def attend_to_all(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            stop = max(start + count for start, count in zip(known, counts, strict=True))
            for stores, new in ((self._keys, k), (self._values, v)):
                rows = self._reserve(stores, layer, stop, new)
                for row, start, piece in zip(rows, known, new.split(list(counts)), strict=True):
                    row[start : start + len(piece)] = piece
            if not any(known):
                return packed(layer, q, k, v)
            return torch.cat([self._attend_alone(layer, b, piece) for b, piece in enumerate(q.split(list(counts)))])

        return attend_to_all

    def _reserve(self, stores: dict[int, torch.Tensor], layer: int, stop: int, like: torch.Tensor) -> torch.Tensor:
        """The rows of a layer, with room for `stop` positions: zeros, because 0 * a masked NaN would be NaN."""
        old = stores.get(layer, like.new_zeros(len(self._known), 0, *like.shape[1:]))
        if old.shape[1] < stop:
            size = min(self._capacity, max(2 * old.shape[1], stop + _GROWTH))
            stores[layer] = torch.cat([old, old.new_zeros(len(old), size - old.shape[1], *old.shape[2:])], dim=1)
        return stores[layer]

    def _attend_alone(self, layer: int, b: int, q: torch.Tensor) -> torch.Tensor:
        """The queries [n, H, D] of the newest n tokens of sequence b, over all its tokens up to their own."""
        stop = self._known[b] + len(q)
        at = torch.arange(stop, device=q.device)
        keys, values = (store[layer][b, :stop].transpose(0, 1) for store in (self._keys, self._values))
        seen = at <= at[self._known[b] :, None]  # is_causal would align the first query with the first key
        grouped = q.shape[1] != keys.shape[0]
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1), keys, values, attn_mask=seen, enable_gqa=grouped)
        return mixed.transpose(0, 1)

    def decode(self) -> Attend:
        """Attention of one new token per sequence (q [B, H, D]) over the cached tokens and itself; stores its k, v."""
        rows, stop = torch.arange(len(self._known), device=self.lengths.device), max(self._known) + 1
        seen = torch.arange(stop, device=self.lengths.device) <= self.lengths.unsqueeze(1)
        mask = seen[:, None, None]  # [B, 1, 1, stop]

        def attend_to_cache(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._reserve(self._keys, layer, stop, k)[rows, self.lengths] = k
            self._reserve(self._values, layer, stop, v)[rows, self.lengths] = v
            keys, values = (store[layer][:, :stop].transpose(1, 2) for store in (self._keys, self._values))
            grouped = q.shape[1] != k.shape[1]
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=grouped)
            return mixed.squeeze(2)

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
        for store in (self._keys, self._values):
            for layer, tensor in store.items():
                store[layer] = tensor.index_select(0, index)
        self._known = [self._known[parent] for parent in parents]
        self.lengths = self.lengths[index]
