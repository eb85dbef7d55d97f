"""Linear layers split over the tensor-parallel ranks; a group of one rank holds the whole weight.

    ColumnLinear  y_i = x W_i^T + b_i      x is outside; rank i computes its range of output features
    RowLinear     y = sum_i x_i W_i^T + b  rank i has its range of input features; y is outside

"Outside" split layers: see layers/tensor_parallel.py.

Backward of column layers that share x: the sum of dx = sum_j dy_j W_j over ranks overlaps with dW_j = dy_j^T x. With
sequence parallelism x is not kept for dW but gathered a second time, which overlaps with the computation of dx.
(Megatron-LM, arXiv:1909.08053, section 3; arXiv:2205.05198, section 4.2.)
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.products import Products
from internlm_lite.layers.recompute import Recipe, made_again
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.layers.weight_grads import accumulating, gradient_passes
from internlm_lite.mesh.layout import split, whole


def output_std(config: ModelConfig) -> float:
    """Initial standard deviation of matrices that write to the residual stream (GPT-2: init_std / sqrt(2 layers))."""
    return config.hidden_std / math.sqrt(2 * config.num_layers)


class _Linear(CostedLayer):
    """A weight [out, in], split over the group along dimension `split_dim`. Raises ConfigError if not divisible."""

    split_dim: int

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        tp_ctx: TensorParallelContext,
        *,
        init_std: float,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        shape = (out_features, in_features)
        layout = split(f"{name}.weight", shape, self.split_dim, tp_ctx.group, init_std=init_std)
        self.weight = tp_ctx.parameter(layout)
        self.weight.matrix_rows = (out_features,)
        self.weight.manual_grad = True
        self.weight.deferred_grad = tp_ctx.weight_grads.deferred
        self.bias = None
        if bias:
            name, whole_shape = f"{name}.bias", (out_features,)
            if self.split_dim == 0:
                layout = split(name, whole_shape, 0, tp_ctx.group)
            else:
                layout = whole(name, whole_shape, partial_over=tp_ctx.partial_over)
            self.bias = tp_ctx.parameter(layout)
            self.bias.manual_grad = True

    def output_bias(self) -> torch.Tensor | None:
        """The bias, to be used once in a forward pass."""
        return None if self.bias is None else accumulating(self.bias)

    @property
    def products(self) -> Products:
        """The context's in training; evaluation and generation use those in the dtype of the weights."""
        return self.tp_ctx.products if torch.is_grad_enabled() else Products()

    def flops_per_token(self, seq_len: int) -> int:
        return 2 * math.prod(self.weight.shard_spec.shape)

    def passes(self, row: RowShape, *, shared_input: bool = False) -> list[Pass]:
        """`shared_input`: another layer counts what x takes."""
        kernels = [Pass("product", 0), Pass("product", 0, 2, backward=True)]
        if row.fp8:  # each operand: its largest magnitude (2), cast (3); transposed for the backward pass (2)
            operands = self.weight.numel() + row.tokens * self.weight.shape[1] * (not shared_input)
            kernels.append(Pass("fused", 5 * operands, 4, part="casts to float8"))
            operands += row.tokens * self.weight.shape[0]
            kernels.append(Pass("fused", 7 * operands, 9, backward=True, part="casts to float8"))
        return kernels + self._bias_passes(row) + gradient_passes(self.weight, row)

    def _bias_passes(self, row: RowShape) -> list[Pass]:
        """The sum of a bias's gradient over the tokens; of a row layer also the addition, which no product makes."""
        if self.bias is None or "block" in row.fused:
            return []
        if self.split_dim == 0:
            return [Pass("reduce", row.tokens * self.weight.shape[0] * self.weight.itemsize, backward=True)]
        outside = self.tp_ctx.hidden_bytes(row.tokens, self.weight.shape[0])
        return [Pass("elementwise", 2 * outside), Pass("reduce", outside, backward=True)]

    def deferred_bytes(self, row: RowShape) -> int:
        return row.tokens * sum(self.weight.shape) * self.tp_ctx.products.itemsize(self.weight.dtype)


class ColumnLinear(_Linear):
    """Holds weight [out / group size, in] and bias [out / group size]; the function `columns` applies it."""

    split_dim = 0

    def saved_bytes(self, row: RowShape) -> Bytes:
        return {"projection inputs": self.tp_ctx.hidden_bytes(row.tokens, self.weight.shape[1])}

    def messages(self, row: RowShape) -> list[Message]:
        n_inputs, tp_ctx = row.tokens * self.weight.shape[1], self.tp_ctx
        gathered_again = tp_ctx.gather_messages(n_inputs, backward=True)  # for the gradient of the weight
        return tp_ctx.gather_messages(n_inputs) + gathered_again + tp_ctx.sum_messages(n_inputs, backward=True)


def columns(x: torch.Tensor, *linears: ColumnLinear, recipe: Recipe | None = None) -> tuple[torch.Tensor, ...]:
    """x outside -> [T, out / group size] for each layer; one gather of x, one sum of dx and one saved x for all.

    `recipe`: of x, which is then not kept for the backward pass but made again."""
    tensors = [tensor for linear in linears for tensor in (linear.weight, linear.output_bias())]
    context = (linears[0].tp_ctx, linears[0].products, recipe)
    outputs: tuple[torch.Tensor, ...] = _Columns.apply(x, *context, *tensors)
    return outputs


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        tp_ctx: TensorParallelContext,
        products: Products,
        recipe: Recipe | None,
        *tensors: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.tp_ctx, ctx.products, ctx.tensors = tp_ctx, products, tensors
        ctx.function, kept = recipe or (None, (x,))
        ctx.save_for_backward(*kept)
        full, gathered = tp_ctx.start_gather(x)
        gathered.wait()
        operand, weights = products.operand(full), cast(Any, tensors[::2])
        return tuple(products.output(operand, w, b) for w, b in zip(weights, tensors[1::2], strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tp_ctx: TensorParallelContext = ctx.tp_ctx
        products: Products = ctx.products
        weights, biases = ctx.tensors[::2], ctx.tensors[1::2]
        full, gathered = tp_ctx.start_gather(made_again(ctx.function, ctx.saved_tensors))
        dys = [products.gradient(dy) for dy in grads]
        dx, summed = tp_ctx.start_sum(products.input_grad(dys, weights))
        gathered.wait()
        operand, made = products.operand(full), []
        for weight, dy, bias, grad in zip(weights, dys, biases, grads, strict=True):
            made += [tp_ctx.weight_grads.compute_or_defer(weight, dy, operand), None if bias is None else grad.sum(0)]
        summed.wait()
        return dx, None, None, None, *made


class RowLinear(_Linear):
    """[T, in / group size] -> activations outside with `out` features, summed over the group.

    Every rank of the group holds the whole bias and adds it once, after the sum.
    """

    split_dim = 1

    def forward(self, x: torch.Tensor, recipe: Recipe | None = None) -> torch.Tensor:
        """`recipe`: as `columns`."""
        y: torch.Tensor = _Row.apply(x, self.tp_ctx, self.products, recipe, self.weight)
        bias = self.output_bias()
        return y if bias is None else y + bias

    def saved_bytes(self, row: RowShape) -> Bytes:
        return {"projection inputs": row.tokens * self.weight.shape[1] * self.weight.itemsize}

    def messages(self, row: RowShape) -> list[Message]:
        n_outputs = row.tokens * self.weight.shape[0]
        return self.tp_ctx.sum_messages(n_outputs) + self.tp_ctx.gather_messages(n_outputs, backward=True)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        tp_ctx: TensorParallelContext,
        products: Products,
        recipe: Recipe | None,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.tp_ctx, ctx.products, ctx.weight = tp_ctx, products, weight
        ctx.function, kept = recipe or (None, (x,))
        ctx.save_for_backward(*kept)
        y, summed = tp_ctx.start_sum(products.output(products.operand(x), weight))
        summed.wait()
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        tp_ctx: TensorParallelContext = ctx.tp_ctx
        products: Products = ctx.products
        full, gathered = tp_ctx.start_gather(grads[0])
        gathered.wait()
        dy, x = products.gradient(full), products.operand(made_again(ctx.function, ctx.saved_tensors))
        dx = products.input_grad([dy], [ctx.weight])
        return dx, None, None, None, tp_ctx.weight_grads.compute_or_defer(ctx.weight, dy, x)
