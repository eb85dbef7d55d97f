"""Keys and values of the tokens so far, so that a new token costs one position instead of a whole forward pass.

prefill   all prompts packed in one row, as in training; each prompt's keys and values are kept
decode    one new token of every sequence at once; sequence b attends to its own lengths[b] + 1 positions
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from internlm_lite.layers.flash import Attend


class KVCache:
    """For `batch` sequences of at most `capacity` tokens. `prefill` once, then `decode` and `advance` in turn.

    A rank keeps the layers and heads that it computes, only.
    """

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self._capacity = capacity
        self._keys: dict[int, torch.Tensor] = {}  # layer -> [batch, capacity, Hkv, D]
        self._values: dict[int, torch.Tensor] = {}
        self._longest = 0

    def prefill(self, lengths: Sequence[int], attend: Attend) -> Attend:
        """The packed attention `attend` of a row of prompts of these lengths, which also fills the cache."""
        self.lengths.copy_(torch.tensor(lengths))
        self._longest = max(lengths)

        def fill(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            self._keys[layer], self._values[layer] = self._rows(k, lengths), self._rows(v, lengths)
            return attend(layer, q, k, v)

        return fill

    def _rows(self, packed: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """[sum of lengths, Hkv, D] -> [batch, capacity, Hkv, D]; zeros else: a masked value takes part as 0 * value."""
        rows = packed.new_zeros(len(lengths), self._capacity, *packed.shape[1:])
        for row, sequence in zip(rows, packed.split(list(lengths)), strict=True):
            row[: len(sequence)] = sequence
        return rows

    def decode(self) -> Attend:
        """Attention of one new token per sequence, [B, H, D], over the sequence's cache and itself."""
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
        """The token of the last `decode` is now part of every sequence."""
        self.lengths += 1
        self._longest += 1
