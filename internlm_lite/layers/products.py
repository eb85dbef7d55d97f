"""The matrix products of a linear layer: y = x W^T, dx = dy W and dW = dy^T x, in the dtype of the weights.

layers/fp8.py has the same ones in float8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.layers.weight_grads import add_product


class Products:
    """`operand` and `gradient` turn x and dy into what the products take, once for all products that take them."""

    def operand(self, x: torch.Tensor) -> Any:
        """x [T, in], for `output` and `add_weight_grad`."""
        return x

    def gradient(self, dy: torch.Tensor) -> Any:
        """dy [T, out], for `input_grad` and `add_weight_grad`."""
        return dy

    def output(self, x: Any, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x W^T + b: [T, out] for weight [out, in]."""
        return F.linear(x, weight, bias)

    def input_grad(self, dys: Sequence[Any], weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of dy W: [T, in]."""
        dx: torch.Tensor = dys[0] @ weights[0]
        for dy, weight in zip(dys[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        return dx

    def add_weight_grad(self, grad: torch.Tensor, dy: Any, x: Any) -> None:
        """grad [out, in] += dy^T x, in the dtype of `grad`."""
        add_product(grad, dy, x)

    def itemsize(self, dtype: torch.dtype) -> int:
        """Bytes of an element of an operand that is made of a tensor of `dtype`."""
        return dtype.itemsize
