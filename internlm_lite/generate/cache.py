"""KV cache: keys and values of earlier tokens, so that a new token costs a forward pass over one position.

prefill   one packed row of all prompts, as in training; stores each prompt's keys and values
decode    one new token per sequence; sequence b attends to its own lengths[b] + 1 positions
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from internlm_lite.layers.flash import Attend


class KVCache:
    """For `batch` sequences of at most `capacity` tokens. Call `prefill` once, then `decode` and `advance` in turn.

    A rank stores only the layers and heads that it computes.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._capacity = capacity
        self._keys: dict[int, torch.Tensor] = {}  # layer -> [batch, capacity, Hkv, D]
        self._values: dict[int, torch.Tensor] = {}
        self._longest = 0

    def prefill(self, lengths: Sequence[int], attend: Attend) -> Attend:
        """`attend`, the packed attention of a row of prompts of these lengths, wrapped so that it fills the cache."""
        self.lengths.copy_(torch.tensor(lengths))
        self._longest = max(lengths)

        def fill(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer], self._values[layer] = self._rows(k, lengths), self._rows(v, lengths)
            return attend(layer, q, k, v)

        return fill

    def _rows(self, packed: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[sum of lengths, Hkv, D] -> [batch, capacity, Hkv, D], zero-padded: 0 * a masked NaN would be NaN."""
        rows = packed.new_zeros(len(lengths), self._capacity, *packed.shape[1:])
        for row, sequence in zip(rows, packed.split(list(lengths)), strict=True):
            row[: len(sequence)] = sequence
        return rows

    def decode(self) -> Attend:
        """Attention of one new token per sequence (q [B, H, D]) over the cached tokens and itself; stores its k, v."""
        rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)
        seen = torch.arange(self._longest + 1, device=self.lengths.device) <= self.lengths.unsqueeze(1)
        mask = seen[:, None, None]  # [B, 1, 1, longest + 1]

        def attend_to_cache(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer][rows, self.lengths] = k
            self._values[layer][rows, self.lengths] = v
            keys = self._keys[layer][:, : self._longest + 1].transpose(1, 2)  # [B, Hkv, longest + 1, D]
            values = self._values[layer][:, : self._longest + 1].transpose(1, 2)
            grouped = q.shape[1] != k.shape[1]
            mixed = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask, enable_gqa=grouped)
            return mixed.squeeze(2)

        return attend_to_cache

    def advance(self) -> None:
        """Count the token of the last `decode` in `lengths`. Call it after the forward pass."""
        self.lengths += 1
        self._longest += 1
