"""Grouped-query attention with one fused projection, in InternLM2's order of rows:

    wqkv:  [ q0 .. q(g-1) k v | q0 .. q(g-1) k v | ... ]      one block per key/value head, g query heads each

so a tensor-parallel rank's share, whole key/value heads, is one range of rows.
What the queries may look at is not decided here: `attend` is packed attention in training, a cache in generation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from internlm_lite.errors import ConfigError
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns
from internlm_lite.layers.placement import Placement
from internlm_lite.layers.rope import Rotary

Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(layer number, q [T, H, D], k [T, Hkv, D], v [T, Hkv, D]) -> [T, H, D]; q, k are rotated, v may be strided."""


class Attention(nn.Module):
    """[T, hidden] outside -> the same. Raises ConfigError when heads do not divide as they must."""

    def __init__(
        self,
        name: str,
        layer: int,
        *,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        bias: bool,
        init_std: float,
        out_std: float,
        place: Placement,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, heads, kv_heads, place.group.size)
        self.layer = layer
        self.place = place
        self.head_dim = hidden_size // heads
        self.queries = heads // kv_heads  # per key/value head
        rows = kv_heads * (self.queries + 2) * self.head_dim
        self.wqkv = ColumnLinear(f"{name}.wqkv", hidden_size, rows, bias, init_std, place)
        self.wo = RowLinear(f"{name}.wo", hidden_size, hidden_size, bias, out_std, place)

    def forward(self, x: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        (qkv,) = columns(x, self.place, self.wqkv)
        heads = qkv.view(qkv.shape[0], -1, self.queries + 2, self.head_dim)  # [T, Hkv, g + 2, D]
        q, k, v = heads.split([self.queries, 1, 1], dim=2)
        mixed = attend(self.layer, rotary(q).flatten(1, 2), rotary(k).squeeze(2), v.squeeze(2))
        return self.wo(mixed.flatten(1))


def check_heads(hidden_size: int, heads: int, kv_heads: int, tp_size: int) -> None:
    """Raises ConfigError unless heads split hidden_size into even parts, kv_heads split heads, and tp_size kv_heads."""
    problems = []
    if hidden_size % heads or (hidden_size // heads) % 2:
        problems.append(
            f"model.hidden_size {hidden_size} over {heads} heads: expected an even number of features per head"
        )
    if heads % kv_heads:
        problems.append(f"model.num_kv_attention_heads {kv_heads}: expected a divisor of num_attention_heads {heads}")
    if kv_heads % tp_size:
        problems.append(f"parallel.tensor {tp_size}: expected a divisor of the {kv_heads} key/value heads")
    if problems:
        raise ConfigError("\n".join(problems))
