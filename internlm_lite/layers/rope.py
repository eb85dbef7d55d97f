"""Rotary position embedding (arXiv:2104.09864), in the rotate-half form of Llama's published weights.

    y = [x1 cos - x2 sin, x2 cos + x1 sin]     x1, x2 the halves of a head, angle_i = position * base^(-2i / head_dim)

Cosines and sines are computed once per forward pass, for the row's positions, and shared by all layers: there is no
table with a maximum position. Angles are float64, so large positions lose no precision in any dtype.
"""

from __future__ import annotations

from typing import Any

import torch

from internlm_lite.layers.costs import Bytes, RowShape


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
    """The rotation of T tokens by their positions, for heads of size `head_dim`; `dtype` is that of q and k."""

    def __init__(self, positions: torch.Tensor, head_dim: int, base: float, dtype: torch.dtype) -> None:
        """positions [T] int64: each token's position in its document."""
        pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
        angle = torch.outer(positions.double(), base ** (-pairs / head_dim))
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        self.cos = torch.cat((cos, cos), dim=-1)[:, None, None]  # [T, 1, 1, head_dim]
        self.signed_sin = torch.cat((-sin, sin), dim=-1)[:, None, None]

    @staticmethod
    def saved_bytes(row: RowShape, head_dim: int, dtype: torch.dtype) -> Bytes:
        """Cosines and sines; saved once, because all layers of a stage share them."""
        return {"rotary table": 2 * row.tokens * head_dim * dtype.itemsize}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, groups, heads, head_dim], any strides -> rotated, contiguous, same shape."""
        return _Rotate.apply(x, self.cos, self.signed_sin)
