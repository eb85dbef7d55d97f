"""Feed-forward part of a block, by model.mlp_type:

    swiglu, geglu, geglu_tanh   w2(act(w1 x) * w3 x)    (arXiv:2002.05202)
    gelu, gelu_tanh, relu       w2(act(w1 x))

with act(x) = x * sigmoid(x), x * Phi(x), the latter approximated by a tanh, or max(x, 0); with model.mlp_bias each
product has a bias.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.compiled import compiled_in_training
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape, add_bytes
from internlm_lite.layers.dropout import Site, SplitDropout
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns, output_std
from internlm_lite.layers.recompute import Recipe, with_recipe
from internlm_lite.layers.tensor_parallel import TensorParallelContext

Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Activation:
    value: Function
    """x -> act(x)."""
    gradient: Function
    """(gradient of act(x), x) -> gradient of x."""


def _gated(activation: _Activation) -> tuple[Function, Function]:
    """(gate, up) -> act(gate) * up, to be compiled; and the same bits, keeping less for the backward pass."""

    def product(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return activation.value(gate) * up

    def lean(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Gated.apply(gate, up, activation)
        return y

    return product, lean


class _Gated(torch.autograd.Function):
    """Without act(gate) among what is kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: _Activation) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation.value(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        d_gate = ctx.activation.gradient(grads[0] * up, gate)
        return d_gate, ctx.activation.value(gate).mul_(grads[0]), None


_gelu_tanh = partial(F.gelu, approximate="tanh")
# Made once, so that all layers share a graph.
_GATED = {
    "swiglu": _gated(_Activation(F.silu, torch.ops.aten.silu_backward)),
    "geglu": _gated(_Activation(F.gelu, torch.ops.aten.gelu_backward)),
    "geglu_tanh": _gated(_Activation(_gelu_tanh, partial(torch.ops.aten.gelu_backward, approximate="tanh"))),
}
_PLAIN: dict[str, Function] = {"gelu": F.gelu, "gelu_tanh": _gelu_tanh, "relu": F.relu}


def _chained(first: Function, then: Function, *inputs: torch.Tensor) -> torch.Tensor:
    return then(first(*inputs))


class FeedForward(CostedLayer):
    """x -> same shape, both outside split layers; `mlp_hidden_size` inner features, split over the group."""

    def __init__(self, name: str, layer: int, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        """`layer`: its number in the whole model."""
        super().__init__()
        self.tp_ctx = tp_ctx
        hidden_size, width, bias = config.hidden_size, config.mlp_hidden_size, config.mlp_bias
        column = partial(ColumnLinear, init_std=config.hidden_std, bias=bias)
        self.w1 = column(f"{name}.w1", hidden_size, width, tp_ctx)  # gate, if there is one
        self.w3 = column(f"{name}.w3", hidden_size, width, tp_ctx) if config.gated_mlp else None  # up
        self.w2 = RowLinear(f"{name}.w2", width, hidden_size, tp_ctx, init_std=output_std(config), bias=bias)
        p = config.feed_forward_dropout
        self.dropout = SplitDropout(p, layer, Site.FEED_FORWARD_INNER, width, tp_ctx) if p else None
        # The output of relu is all that its gradient takes.
        self._remade = tp_ctx.selective and config.mlp_type != "relu"
        if self.w3 is None:
            self._inner = _PLAIN[config.mlp_type]
        else:
            product, lean = _GATED[config.mlp_type]
            use_lean = tp_ctx.selective and not tp_ctx.compiled  # the compiler keeps no act(gate)
            self._inner = lean if use_lean else compiled_in_training(product, wanted=tp_ctx.compiled)

    def forward(
        self, x: torch.Tensor, recipe: Recipe | None = None, token_keys: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`recipe`: of x, as in `columns`. `token_keys`: of all tokens of the row, for dropout."""
        kept = columns(x, *self._inputs(), recipe=recipe)
        made, remade = self._inner, self._remade
        if self.dropout is not None and token_keys is not None:
            dropped = partial(self.dropout, keys=token_keys)
            if remade:
                made = partial(_chained, self._inner, dropped)
            else:
                made, kept, remade = dropped, (self._inner(*kept),), self.tp_ctx.selective
        y: torch.Tensor = self.w2(*with_recipe(made, *kept, wanted=remade))
        return y

    def _inputs(self) -> tuple[ColumnLinear, ...]:
        return (self.w1,) if self.w3 is None else (self.w1, self.w3)

    # w1 and w3 share their input: it is saved and gathered once, and its gradient is summed once.

    def saved_bytes(self, row: RowShape) -> Bytes:
        inner = self.w2.saved_bytes(row)["projection inputs"]  # of each product, of what is made of them
        products = len(self._inputs())
        made = 1 if self._inner is F.relu else products if row.selective else 2 * products
        made += self._inner is F.relu and self.dropout is not None and not row.selective
        return add_bytes(self.w1.saved_bytes(row), {"feed-forward": made * inner})

    def messages(self, row: RowShape) -> list[Message]:
        return self.w1.messages(row) + self.w2.messages(row)

    def passes(self, row: RowShape) -> list[Pass]:
        inner = self.w2.saved_bytes(row)["projection inputs"]  # gate, act(gate), up, their product, or a gradient
        if self.w3 is None:
            made = [Pass("elementwise", 2 * inner), Pass("elementwise", 3 * inner, backward=True)]
        elif "activation" in row.fused:
            made = [Pass("fused", 3 * inner), Pass("fused", 5 * inner, backward=True)]
        else:
            again = 2 * inner if row.selective else 0  # act(gate), which is not kept
            made = [Pass("elementwise", 5 * inner, 2), Pass("elementwise", 9 * inner + again, 3, backward=True)]
        if row.selective and self._inner is not F.relu:
            made.append(replace(made[0], backward=True, part="recomputation"))
        shared = [] if self.w3 is None else self.w3.passes(row, shared_input=True)
        made += [] if self.dropout is None else self.dropout.passes(row)
        return [*self.w1.passes(row), *shared, *self.w2.passes(row), *made]

    def deferred_bytes(self, row: RowShape) -> int:
        if self.w3 is None:
            return super().deferred_bytes(row)
        weight = self.w3.weight
        shared_input = row.tokens * weight.shape[1] * self.tp_ctx.products.itemsize(weight.dtype)
        return super().deferred_bytes(row) - shared_input

    def workspace_bytes(self, row: RowShape) -> int:
        """Of the first steps of the backward pass; later gradients reuse the memory of freed activations."""
        weight = self.w2.weight
        factors = 2 * row.tokens * weight.shape[1]  # gradients of the product and of one factor
        own = (factors + weight.numel()) * weight.itemsize  # and of a weight before it is added to its bucket
        return own if self.dropout is None else max(own, self.dropout.workspace_bytes(row))
