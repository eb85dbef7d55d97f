"""Rotary position embedding (arXiv:2104.09864), in the rotate-half form of Llama's published weights.

    y = [x1 cos - x2 sin, x2 cos + x1 sin]     x1, x2 the halves of a head, angle_i = position * base^(-2i / head_dim)

Cosines and sines are computed once per forward pass, for the row's positions, and shared by all layers: there is no
table with a maximum position. Angles are float64, so large positions lose no precision in any dtype.

With model.rope_scaling the frequencies f_i = base^(-2i / head_dim) become, for w_i = 2 pi / f_i and L the original
length (as in transformers' modeling_rope_utils.py):

    linear   f / factor
    llama3   f if w < L / high, f / factor if w > L / low, else a mix that is linear in L / w
    yarn     f for pairs i below `pair(beta_fast)`, f / factor above `pair(beta_slow)`, else a mix that is linear in
             i; pair(n) = head_dim ln(L / (2 pi n)) / (2 ln base) turns n times in L; q, k grow by attention_factor
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.config.schema import ModelConfig, RopeScaling
from internlm_lite.layers.costs import Bytes, RowShape


@dataclass(frozen=True)
class RopeFrequencies:
    """The rotation of a head: how fast each pair turns, and how much queries and keys grow."""

    radians: torch.Tensor
    """[head_dim / 2] float64, per position. A plain tensor: a buffer would be cast with the model."""
    growth: float = 1.0


def plain_frequencies(head_dim: int, base: float, device: torch.device | None = None) -> torch.Tensor:
    """base^(-2i / head_dim): [head_dim / 2] float64."""
    return base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)


def rope_frequencies(config: ModelConfig, device: torch.device) -> RopeFrequencies:
    """The frequencies of model.rope_base and model.rope_scaling."""
    plain, scaling = plain_frequencies(config.head_size, config.rope_base, device), config.rope_scaling
    if scaling is None:
        return RopeFrequencies(plain)
    if scaling.rope_type == "linear":
        return RopeFrequencies(plain / scaling.factor)
    if scaling.rope_type == "llama3":
        return RopeFrequencies(_mixed(plain, scaling.factor, _llama3_kept(plain, scaling)))
    growth = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1
    return RopeFrequencies(_mixed(plain, scaling.factor, _yarn_kept(plain, config.rope_base, scaling)), growth)


def _mixed(plain: torch.Tensor, factor: float, kept: torch.Tensor) -> torch.Tensor:
    """`kept` 1: the frequency as it was; 0: divided by `factor`."""
    return plain * kept + plain / factor * (1 - kept)


def _llama3_kept(plain: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    assert scaling.original_max_position_embeddings is not None, "checked with the config"
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _yarn_kept(plain: torch.Tensor, base: float, scaling: RopeScaling) -> torch.Tensor:
    assert scaling.original_max_position_embeddings is not None, "checked with the config"
    length, head_dim = scaling.original_max_position_embeddings, 2 * len(plain)

    def pair(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    index = torch.arange(len(plain), dtype=torch.float64, device=plain.device)
    return 1 - ((index - low) / max(high - low, 0.001)).clamp(0, 1)


class _Rotate(torch.autograd.Function):
    """Rotates forward and applies the inverse rotation to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, signed_sin)
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), signed_sin)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cos, signed_sin = ctx.saved_tensors
        dy = grads[0]
        return torch.addcmul(dy * cos, dy.roll(dy.shape[-1] // 2, -1), signed_sin, value=-1), None, None


class Rotary:
    """The rotation of T tokens by their positions; `dtype` is that of q and k."""

    def __init__(self, positions: torch.Tensor, frequencies: RopeFrequencies, dtype: torch.dtype) -> None:
        """positions [T] int64: each token's position in its document."""
        angle = torch.outer(positions.double(), frequencies.radians)
        growth = frequencies.growth
        cos, sin = (angle.cos() * growth).to(dtype), (angle.sin() * growth).to(dtype)
        self.cos = torch.cat((cos, cos), dim=-1)[:, None, None]  # [T, 1, 1, head_dim]
        self.signed_sin = torch.cat((-sin, sin), dim=-1)[:, None, None]

    @staticmethod
    def saved_bytes(row: RowShape, head_dim: int, dtype: torch.dtype) -> Bytes:
        """Cosines and sines; saved once, because all layers of a stage share them."""
        return {"rotary table": 2 * row.tokens * head_dim * dtype.itemsize}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, groups, heads, head_dim], any strides -> rotated, contiguous, same shape."""
        return _Rotate.apply(x, self.cos, self.signed_sin)
