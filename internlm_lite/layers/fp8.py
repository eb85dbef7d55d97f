"""Matrix products in float8 (model.fp8), with sums in fp32 and results in bf16.

    y = x W^T       x and W in e4m3: 3 bits of mantissa
    dx = dy W       dy in e5m2: 2 bits, and the range that gradients need
    dW = dy^T x

Each operand is multiplied by one scale, computed from its own largest magnitude whenever it is cast. Nothing is kept from
one step to the next, so recomputed layers, resumed runs and pipelines give the same bits. A tensor-parallel rank scales
its own shard: layouts agree to the rounding of float8, and no collective is needed.

One scale for a tensor instead of one for a row: dW sums over tokens, so x and dy would need a second cast with scales
by column, and the kernels with scales by row are slower. Llama 3 8B on 8 H100, compiled: bf16 5,760 tokens/s, by row
6,424, by tensor 7,186 (pytorch/torchtitan, commit 7a04053). Scales are powers of two: multiplying by one is exact in
bf16 as well, so the only rounding is that of the cast, and an operand cannot exceed the largest float8 number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from internlm_lite.errors import ConfigError
from internlm_lite.layers.products import Products

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_LEAST = 2.0**-64
"""Least magnitude that is scaled to the largest float8 number: zeros have a finite scale, and the product of two inverse
scales does not underflow."""
_EXPONENT = 0x7F800000
"""The exponent's bits of an fp32 number; without the others, a positive number is rounded down to a power of two."""


class Scaled(NamedTuple):
    """A matrix in float8: `values * inverse`."""

    values: torch.Tensor
    """[rows, columns], contiguous."""
    inverse: torch.Tensor
    """fp32 scalar, a power of two."""

    def transposed(self) -> Scaled:
        return Scaled(self.values.t().contiguous(), self.inverse)


def scaled(x: torch.Tensor, dtype: torch.dtype) -> Scaled:
    """x in bf16 or fp32, rounded to the float8 `dtype`. A NaN or an infinity in x gives NaN there, or everywhere."""
    largest = torch.linalg.vector_norm(x, math.inf).float().clamp(min=_LEAST)
    ratio = torch.finfo(dtype).max / largest
    scale = (ratio.view(torch.int32) & _EXPONENT).view(torch.float32)
    return Scaled((x * scale).to(dtype).contiguous(), scale.reciprocal())


def scaled_product(a: Scaled, b: Scaled, *, fast: bool = False) -> torch.Tensor:
    """a b^T [M, N] in bf16 for a [M, K] and b [N, K]; on CUDA K and N must be multiples of 16.

    `fast`: sum with fewer bits, where the device can (H100). Devices without float8 compute the same products in fp32.
    """
    if a.values.is_cuda:
        return torch._scaled_mm(
            a.values, b.values.t(), a.inverse, b.inverse, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    return ((a.values.float() @ b.values.float().t()) * a.inverse * b.inverse).bfloat16()


class Float8Products(Products):
    """Products of operands that are `Scaled`. Forward sums are fast ones; those of gradients are not."""

    def operand(self, x: torch.Tensor) -> Scaled:
        return scaled(x, _E4M3)

    def gradient(self, dy: torch.Tensor) -> Scaled:
        return scaled(dy, _E5M2)

    def output(self, x: Scaled, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = scaled_product(x, scaled(weight, _E4M3), fast=True)
        return y if bias is None else y + bias

    def input_grad(self, dys: Sequence[Scaled], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        parts = [scaled_product(dy, scaled(w, _E4M3).transposed()) for dy, w in zip(dys, weights, strict=True)]
        return sum(parts[1:], parts[0])

    def add_weight_grad(self, grad: torch.Tensor, dy: Scaled, x: Scaled) -> None:
        operands = (*dy.transposed(), *x.transposed())
        if torch.compiler.is_compiling():
            _add_scaled_product_in_graph(grad, *operands)
        else:
            _add_scaled_product(grad, *operands)

    def itemsize(self, dtype: torch.dtype) -> int:
        return 1


def _add_scaled_product(
    grad: torch.Tensor, a: torch.Tensor, a_inverse: torch.Tensor, b: torch.Tensor, b_inverse: torch.Tensor
) -> None:
    grad.add_(scaled_product(Scaled(a, a_inverse), Scaled(b, b_inverse)))


_add_scaled_product_in_graph = torch.library.custom_op(
    "internlm_lite::add_scaled_product", _add_scaled_product, mutates_args=("grad",)
)
"""One operation of a graph, which runs in its place and in place."""


def require_float8(device: torch.device) -> None:
    """Raises ConfigError for a GPU that cannot multiply float8 numbers; on the CPU they are emulated."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < (8, 9):
        raise ConfigError(
            f"model.fp8=True on {torch.cuda.get_device_name(device)} of compute capability {capability[0]}.{capability[1]}: "
            "expected an NVIDIA GPU of 8.9 (L40S, RTX 4090) or newer (H100, B200); set model.fp8=False"
        )
