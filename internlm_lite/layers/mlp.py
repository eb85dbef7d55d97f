"""SwiGLU feed-forward: w2(silu(w1 x) * w3 x)   (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.compiled import compiled_in_training
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, RowShape, add_bytes
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns, output_std
from internlm_lite.layers.recompute import Recipe, with_recipe
from internlm_lite.layers.tensor_parallel import TensorParallelContext


class SwiGLU(CostedLayer):
    """x -> same shape, both outside split layers; `mlp_hidden_size` inner features, split over the group."""

    def __init__(self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        hidden_size, width = config.hidden_size, config.mlp_hidden_size
        self.w1 = ColumnLinear(f"{name}.w1", hidden_size, width, tp_ctx, init_std=config.init_std)  # gate
        self.w3 = ColumnLinear(f"{name}.w3", hidden_size, width, tp_ctx, init_std=config.init_std)  # up
        self.w2 = RowLinear(f"{name}.w2", width, hidden_size, tp_ctx, init_std=output_std(config))
        self._gated = compiled_in_training(_lean_gated if tp_ctx.selective else _gated, wanted=tp_ctx.compiled)

    def forward(self, x: torch.Tensor, recipe: Recipe | None = None) -> torch.Tensor:
        """`recipe`: of x, as in `columns`."""
        gate, up = columns(x, self.w1, self.w3, recipe=recipe)
        y: torch.Tensor = self.w2(*with_recipe(self._gated, gate, up, wanted=self.tp_ctx.selective))
        return y

    # w1 and w3 share their input: it is saved and gathered once, and its gradient is summed once.

    def saved_bytes(self, row: RowShape) -> Bytes:
        inner = self.w2.saved_bytes(row)["projection inputs"]  # of each of gate, silu(gate), up, and their product
        return add_bytes(self.w1.saved_bytes(row), {"feed-forward": (2 if row.selective else 4) * inner})

    def messages(self, row: RowShape) -> list[Message]:
        return self.w1.messages(row) + self.w2.messages(row)

    def deferred_bytes(self, row: RowShape) -> int:
        weight = self.w3.weight
        shared_input = row.tokens * weight.shape[1] * self.tp_ctx.products.itemsize(weight.dtype)
        return super().deferred_bytes(row) - shared_input

    def workspace_bytes(self, row: RowShape) -> int:
        """Of the first steps of the backward pass; later gradients reuse the memory of freed activations."""
        weight = self.w2.weight
        factors = 2 * row.tokens * weight.shape[1]  # gradients of the product and of one factor
        return (factors + weight.numel()) * weight.itemsize  # and of a weight before it is added to its bucket


def _gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


class _Gated(torch.autograd.Function):
    """The same bits, forward and backward, without silu(gate) among what is kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return d_gate, F.silu(gate).mul_(grads[0])


def _lean_gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = _Gated.apply(gate, up)
    return y
