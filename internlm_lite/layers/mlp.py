"""SwiGLU feed-forward: w2(silu(w1 x) * w3 x)   (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns
from internlm_lite.layers.placement import Placement


class SwiGLU(nn.Module):
    """[T, hidden] outside -> the same, `width` features inside, split over the tensor-parallel ranks."""

    def __init__(
        self, name: str, hidden_size: int, width: int, *, init_std: float, out_std: float, place: Placement
    ) -> None:
        super().__init__()
        self.place = place
        self.w1 = ColumnLinear(f"{name}.w1", hidden_size, width, False, init_std, place)  # gate
        self.w3 = ColumnLinear(f"{name}.w3", hidden_size, width, False, init_std, place)  # up
        self.w2 = RowLinear(f"{name}.w2", width, hidden_size, False, out_std, place)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = columns(x, self.place, self.w1, self.w3)
        return self.w2(F.silu(gate) * up)
