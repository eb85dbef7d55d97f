"""Positions that are added to the token embedding: model.position "learned" and "sinusoidal".

    learned      row `position` of a weight [max_position_embeddings, hidden]
    sinusoidal   column 2j: sin(position * 10000^(-2j / hidden)), column 2j + 1: its cosine   (arXiv:1706.03762, 3.5)

A tensor-parallel rank makes its range of columns, for all tokens of the row, and the embedding adds them before the
message that it sends anyway. So a learned weight is split over the ranks in memory, no rank has a partial gradient of
it, with sequence parallelism neither, and there is no further message. Whole on each rank, it would cost both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Pass, RowShape
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype
from internlm_lite.layers.weight_grads import grad_buffer, gradient_passes, report_grad
from internlm_lite.mesh.layout import Parameter, parameter, split

_BASE = 10000.0


class _LookUp(torch.autograd.Function):
    """Adds the gradients of rows to `main_grad`: autograd would make a gradient of the whole weight for them."""

    @staticmethod
    def forward(ctx: Any, weight: Parameter, rows: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(rows)
        return F.embedding(rows, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (rows,), grad = ctx.saved_tensors, grad_buffer(ctx.weight)
        grad.index_add_(0, rows, grads[0].to(grad.dtype))
        report_grad(ctx.weight)
        return None, None


def look_up(weight: Parameter, rows: torch.Tensor) -> torch.Tensor:
    """[T, width]: rows `rows` [T] of `weight`."""
    return F.embedding(rows, weight) if weight.main_grad is None else _LookUp.apply(weight, rows)


def look_up_passes(weight: Parameter, row: RowShape) -> list[Pass]:
    """Of a `look_up` for every token of the row, and of its gradient."""
    n_looked_up, item = row.tokens * weight.shape[1], weight.itemsize
    found = [Pass("contiguous_copy", 2 * item * n_looked_up)]
    if "gradients" in row.fused:  # rows are cast and added
        wide = accumulation_dtype(weight.dtype).itemsize
        found.append(Pass("contiguous_copy", (item + 4 * wide) * n_looked_up, 2, backward=True))
    else:  # a dense gradient: zeros, and the tokens' rows added
        dense = 3 * item * n_looked_up + weight.nbytes
        found += [Pass("contiguous_copy", dense, 8, backward=True), *gradient_passes(weight, row)]
    return [replace(one, part="embedding") for one in found]


class LearnedPositions(CostedLayer):
    """positions [T] int64 -> this rank's columns of their rows, [T, hidden / group size]."""

    def __init__(self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        assert config.max_position_embeddings is not None, "checked with the config"
        shape = (config.max_position_embeddings, config.hidden_size)
        layout = split(f"{name}.weight", shape, 1, tp_ctx.group, init_std=config.init_std)
        self.weight = parameter(layout, tp_ctx.dtype, tp_ctx.device)
        self.weight.manual_grad = self.weight.deferred_grad = self.weight.looked_up = True

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        return look_up(self.weight, positions)

    def saved_bytes(self, row: RowShape) -> Bytes:
        return {}  # the batch's positions alone

    def passes(self, row: RowShape) -> list[Pass]:
        """And the addition to the token embedding."""
        added = Pass("elementwise", 3 * row.tokens * self.weight.shape[1] * self.weight.itemsize, part="embedding")
        return [*look_up_passes(self.weight, row), added]


def sinusoidal(positions: torch.Tensor, hidden_size: int, columns: range, dtype: torch.dtype) -> torch.Tensor:
    """positions [T] int64 -> [T, len(columns)]: these columns of the fixed embedding. Angles are float64."""
    first = columns.start // 2
    pairs = torch.arange(first, (columns.stop + 1) // 2, dtype=torch.float64, device=positions.device)
    angle = torch.outer(positions.double(), _BASE ** (-2 * pairs / hidden_size))
    both = torch.stack((angle.sin().to(dtype), angle.cos().to(dtype)), dim=-1).flatten(1)
    return both[:, columns.start - 2 * first :][:, : len(columns)]
