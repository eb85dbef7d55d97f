"""Linear layers split over the tensor-parallel ranks; a group of one rank holds the whole.

    ColumnLinear  y_i = x W_i^T + b_i      each rank makes its own features; x is the same on all ranks
    RowLinear     y = sum_i x_i W_i^T + b  each rank has its own features of x; y is the same on all ranks

(Megatron-LM, arXiv:1909.08053, section 3.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.layers.placement import Placement
from internlm_lite.mesh.conjugate import reduce_from_group
from internlm_lite.mesh.layout import parameter, split, whole


class ColumnLinear(nn.Module):
    """[..., in] -> [..., out / group size].

    The caller sends x through `copy_to_group` first, once for all the column layers that share it, so that its gradient
    is summed over the group in one collective.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, bias: bool, init_std: float, place: Placement
    ) -> None:
        super().__init__()
        layout = split(f"{name}.weight", (out_features, in_features), 0, place.group, init_std=init_std)
        self.weight = parameter(layout, place.dtype, place.device)
        self.bias = None
        if bias:
            self.bias = parameter(split(f"{name}.bias", (out_features,), 0, place.group), place.dtype, place.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(nn.Module):
    """[..., in / group size] -> [..., out], summed over the group.

    The bias is stored whole on every rank of the group and added once, after the sum.
    """

    def __init__(
        self, name: str, in_features: int, out_features: int, bias: bool, init_std: float, place: Placement
    ) -> None:
        super().__init__()
        self.group = place.group
        layout = split(f"{name}.weight", (out_features, in_features), 1, place.group, init_std=init_std)
        self.weight = parameter(layout, place.dtype, place.device)
        self.bias = None
        if bias:
            self.bias = parameter(whole(f"{name}.bias", (out_features,)), place.dtype, place.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = reduce_from_group(F.linear(x, self.weight), self.group)
        return y if self.bias is None else y + self.bias
