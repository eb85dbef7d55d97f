"""Token embedding, split over the tensor-parallel ranks along the hidden dimension or along the vocabulary.

split hidden:      each rank looks up its columns of every row, then the columns are gathered
split vocabulary:  each rank looks up the tokens whose rows it holds, zero elsewhere, then the rows are summed

With sequence parallelism a rank gets all columns of its share of the rows in either case.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.layers.placement import Placement
from internlm_lite.mesh.conjugate import columns_to_rows, gather_last
from internlm_lite.mesh.layout import parameter, split


class Embedding(nn.Module):
    """tokens [T] int64 -> [T, hidden] outside split layers (layers/placement.py).

    `grad_scale` = a gives a*e + (1-a)*e.detach(): the same values, a times the gradient (GLM-130B, arXiv:2210.02414,
    section 2.2: embedding gradient shrink).
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        hidden_size: int,
        *,
        split_hidden: bool,
        grad_scale: float,
        init_std: float,
        place: Placement,
        summed: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.place = place
        self.split_hidden = split_hidden
        self.grad_scale = grad_scale
        shape = (vocab_size, hidden_size)
        layout = split(f"{name}.weight", shape, 1 if split_hidden else 0, place.group, init_std=init_std, summed=summed)
        self.weight = parameter(layout, place.dtype, place.device)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        e = self._gathered(tokens) if self.split_hidden else self._summed(tokens)
        # lerp(e, e, a) = e + a*(e - e): exactly e, in every dtype.
        return e if self.grad_scale == 1 else torch.lerp(e.detach(), e, self.grad_scale)

    def _gathered(self, tokens: torch.Tensor) -> torch.Tensor:
        mine, group = F.embedding(tokens, self.weight), self.place.group
        return columns_to_rows(mine, group) if self.place.by_sequence else gather_last(mine, group)

    def _summed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.place.group.rank * rows
        here = (local >= 0) & (local < rows)
        looked_up = F.embedding(local.clamp(0, rows - 1), self.weight)
        return self.place.leave(looked_up * here.unsqueeze(-1))
