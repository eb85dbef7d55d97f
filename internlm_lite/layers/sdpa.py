"""The reference for packed attention: PyTorch's scaled_dot_product_attention on every document alone.

    row:   [ 0 . . . | 1 . . . | 2 . . ]     neighbours of equal length share a call: [2, length], then [1, length]

No mask over the row exists: work is the sum of the squared lengths, not T^2. Runs on every device and dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, pairwise

import torch
import torch.nn.functional as F

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer number, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]; q, k are rotated, v may be strided."""


def packed_sdpa(boundaries: tuple[int, ...]) -> Attend:
    """`boundaries`: 0, ends of documents ..., T, as host integers."""
    lengths = [stop - start for start, stop in pairwise(boundaries) if stop > start]
    runs = [(len(list(equal)), length) for length, equal in groupby(lengths)]
    sizes = [count * length for count, length in runs]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if len(runs) == 1:
            return _causal(q, k, v, *runs[0])
        # One split, not slices: the backward pass of a split is one concatenation.
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes), runs, strict=True)
        return torch.cat([_causal(q, k, v, *run) for q, k, v, run in parts])

    return attend


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """`count` documents of `length` tokens side by side: [count * length, heads, head_dim], without copies."""
    q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(0, 1)
