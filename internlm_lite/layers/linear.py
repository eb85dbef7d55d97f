"""Linear layers split over the tensor-parallel ranks; a group of one rank holds the whole.

    ColumnLinear  y_i = x W_i^T + b_i      each rank makes its own features; x comes from outside (layers/placement.py)
    RowLinear     y = sum_i x_i W_i^T + b  each rank has its own features of x; y goes outside

Backward of column layers that share x: dx = sum_j dy_j W_j is on its way to the other ranks while dW_j = dy_j^T x is
computed. With sequence parallelism x is gathered again for dW instead of kept, while dx is computed.
(Megatron-LM, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.layers.placement import Placement
from internlm_lite.mesh.layout import parameter, split, whole


class ColumnLinear(nn.Module):
    """Holds weight [out / group size, in] and bias [out / group size]; `columns` applies it."""

    def __init__(
        self, name: str, in_features: int, out_features: int, bias: bool, init_std: float, place: Placement
    ) -> None:
        super().__init__()
        layout = split(f"{name}.weight", (out_features, in_features), 0, place.group, init_std=init_std)
        self.weight = parameter(layout, place.dtype, place.device)
        self.weight.past_autograd = place.weight_grads.deferred
        self.bias = None
        if bias:
            self.bias = parameter(split(f"{name}.bias", (out_features,), 0, place.group), place.dtype, place.device)


def columns(x: torch.Tensor, place: Placement, *linears: ColumnLinear) -> tuple[torch.Tensor, ...]:
    """x from outside -> [T, out / group size] of every layer: one gather and one sum for all of them."""
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.bias)]
    outputs: tuple[torch.Tensor, ...] = _Columns.apply(x, place, *tensors)
    return outputs


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: Placement, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.place, ctx.tensors = place, tensors
        ctx.save_for_backward(x)
        full, gathered = place.start_gather(x)
        gathered.wait()
        weights: Any = tensors[::2]
        return tuple(F.linear(full, w, b) for w, b in zip(weights, tensors[1::2], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        place: Placement = ctx.place
        weights, biases = ctx.tensors[::2], ctx.tensors[1::2]
        full, gathered = place.start_gather(ctx.saved_tensors[0])
        dx = grads[0] @ weights[0]
        for dy, weight in zip(grads[1:], weights[1:], strict=True):
            dx.addmm_(dy, weight)
        dx, summed = place.start_sum(dx)
        gathered.wait()
        made = []
        for dy, weight, bias in zip(grads, weights, biases, strict=True):
            made += [place.weight_grads.of(weight, dy, full), None if bias is None else dy.sum(0)]
        summed.wait()
        return dx, None, *made


class RowLinear(nn.Module):
    """[T, in / group size] -> [T, in] outside, summed over the group.

    The bias is stored whole on every rank of the group and added once, after the sum.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, bias: bool, init_std: float, place: Placement
    ) -> None:
        super().__init__()
        self.place = place
        layout = split(f"{name}.weight", (out_features, in_features), 1, place.group, init_std=init_std)
        self.weight = parameter(layout, place.dtype, place.device)
        self.weight.past_autograd = place.weight_grads.deferred
        self.bias = None
        if bias:
            layout = whole(f"{name}.bias", (out_features,), summed=place.summed)
            self.bias = parameter(layout, place.dtype, place.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Row.apply(x, self.place, self.weight)
        return y if self.bias is None else y + self.bias


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: Placement, weight: torch.Tensor) -> torch.Tensor:
        ctx.place, ctx.weight = place, weight
        ctx.save_for_backward(x)
        y, summed = place.start_sum(F.linear(x, weight))
        summed.wait()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        place: Placement = ctx.place
        dy, gathered = place.start_gather(grads[0])
        gathered.wait()
        return dy @ ctx.weight, None, place.weight_grads.of(ctx.weight, dy, ctx.saved_tensors[0])
