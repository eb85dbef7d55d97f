"""Gradients of weights, which layers add to the optimizer's buffers themselves.

Autograd would write dW in the dtype of the weight, cast it to that of the buffer and add it: 20 bytes an element with
bf16. On CUDA the matrix product adds into the fp32 buffer instead. Nor does autograd see a gradient of another dtype
than its weight, which torch.compile refuses. Linear layers may also defer dW for a zero-bubble pipeline schedule, which
splits the backward pass: dx = dy W runs first, because the previous stage waits for it; dW = dy^T x, which no rank
waits for, fills idle time (arXiv:2401.10241).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from internlm_lite.layers.costs import Pass, RowShape
from internlm_lite.mesh.layout import Parameter


def add_product(grad: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """grad [out, in] += dy^T x for dy [T, out] and x [T, in], in the dtype of `grad`."""
    if torch.compiler.is_compiling():
        _add_product_in_graph(grad, dy, x)
    elif grad.is_cuda and grad.dtype == torch.float32 and x.dtype.itemsize == 2 and adds_in_fp32(x.dtype, x.device):
        torch.ops.aten.addmm.dtype_out(grad, dy.t(), x, torch.float32, out=grad)
    else:
        grad.add_(dy.t() @ x)


@functools.cache
def adds_in_fp32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` can be added to an fp32 matrix in one operation: builds of torch raise or are wrong.

    Tried once; the host waits for the answer."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), 0.125, dtype=torch.float32, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, ones.t(), ones, torch.float32, out=total)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return bool((total == 16.125).all())


@torch.library.custom_op("internlm_lite::add_product", mutates_args=("grad",))
def _add_product_in_graph(grad: torch.Tensor, dy: torch.Tensor, x: torch.Tensor) -> None:
    """`add_product` as one operation of a graph, which runs in its place and in place."""
    add_product(grad, dy, x)


def gradient_passes(weight: Parameter, row: RowShape) -> list[Pass]:
    """What adding a gradient to its fp32 buffer moves, besides the product that makes it: a read and a write of the
    buffer in the product, or an addition, after a cast where autograd adds it."""
    item, part = weight.itemsize, "weight gradients"
    if "gradients" in row.fused and item == 2:
        n_bytes, kernels = weight.numel() * (10 if row.fp8 else 8), int(row.fp8)
        return [Pass("broadcast" if row.fp8 else "accumulate", n_bytes, kernels, backward=True, part=part)]
    cast = [Pass("cast", 6 * weight.numel(), backward=True, part=part)] if item == 2 else []
    return [*cast, Pass("elementwise", 3 * max(4, item) * weight.numel(), backward=True, part=part)]


class _AddToMainGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, main_grad: torch.Tensor) -> torch.Tensor:
        ctx.main_grad = main_grad  # not a saved tensor: other backward passes change it in between
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.main_grad.add_(grads[0])
        return None, None


def accumulating(weight: Parameter) -> torch.Tensor:
    """`weight`, to be used once; its gradient is added to `weight.main_grad`, if there is one."""
    return weight if weight.main_grad is None else _AddToMainGrad.apply(weight, weight.main_grad)


def report_grad(weight: Parameter) -> None:
    """Tell the optimizer, if there is one, that a gradient of `weight` was added."""
    if weight.on_grad is not None:
        weight.on_grad(weight)


def grad_buffer(weight: torch.Tensor) -> torch.Tensor:
    """`weight.main_grad`, for a gradient that its unit's backward pass may not be the one to add (`deferred_grad`)."""
    give_memory = getattr(weight, "before_grad", None)
    if give_memory is not None:
        give_memory()
    grad: torch.Tensor | None = getattr(weight, "main_grad", None)
    assert grad is not None, "the optimizer gives every such parameter its gradient buffer"
    return grad


class WeightGrads:
    """Shared by all linear layers of this rank's pipeline stages."""

    def __init__(self, *, deferred: bool = False, add: Callable[[torch.Tensor, Any, Any], None] = add_product) -> None:
        """`add(grad, dy, x)`: grad += dy^T x for dy and x in the form in which `compute_or_defer` is given them."""
        self.deferred, self._add = deferred, add
        self._waiting: list[tuple[Parameter, Any, Any]] = []

    def compute_or_defer(self, weight: Parameter, dy: Any, x: Any) -> torch.Tensor | None:
        """dW [out, in] = dy^T x for dy [T, out] and x [T, in], for autograd to add.

        None: it is added to `weight.main_grad` already; or, if deferred, dy and x are kept."""
        if self.deferred:
            self._waiting.append((weight, dy, x))
            return None
        if weight.main_grad is not None:
            self._add(weight.main_grad, dy, x)
            return None
        self._add(grad := torch.zeros_like(weight), dy, x)
        return grad

    def pop_deferred(self) -> Callable[[], None]:
        """A function that computes the gradients deferred since the last call, in the order in which they were, and
        adds them to `weight.main_grad`."""
        taken, self._waiting = self._waiting[::-1], []

        @torch.no_grad()
        def run() -> None:
            while taken:
                weight, dy, x = taken.pop()
                self._add(grad_buffer(weight), dy, x)
                report_grad(weight)

        return run
