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
            if layer not in self._keys:  # zeros, because 0 * a masked NaN would be NaN
                shape = (len(counts), self._capacity, *k.shape[1:])
                self._keys[layer], self._values[layer] = k.new_zeros(shape), v.new_zeros(shape)
            for store, new in ((self._keys[layer], k), (self._values[layer], v)):
                for row, start, piece in zip(store, known, new.split(list(counts)), strict=True):
                    row[start : start + len(piece)] = piece
            if not any(known):
                return packed(layer, q, k, v)
            return torch.cat([self._attend_alone(layer, b, piece) for b, piece in enumerate(q.split(list(counts)))])

        return attend_to_all

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
            self._keys[layer][rows, self.lengths] = k
            self._values[layer][rows, self.lengths] = v
            keys, values = (store[layer][:, :stop].transpose(1, 2) for store in (self._keys, self._values))
            grouped = q.shape[1] != k.shape[1]
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=grouped)
            return mixed.squeeze(2)

        return attend_to_cache

    def advance(self, counts: Sequence[int]) -> None:
        """Count the tokens of the last `extend` or `decode` in `lengths`."""
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
