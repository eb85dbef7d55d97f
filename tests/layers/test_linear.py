"""Column and row layers: the gradients of plain linear layers, and when the sum of dx travels."""

from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers import tensor_parallel
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.layers.weight_grads import WeightGrads, adds_in_fp32
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import single_process_mesh


def context(deferred: bool = False) -> TensorParallelContext:
    grads = WeightGrads(deferred=deferred)
    return TensorParallelContext(single_process_mesh().tp, torch.float64, torch.device("cpu"), weight_grads=grads)


def filled(layer: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for param in layer.parameters():
        param.data.normal_(generator=generator)
        param.main_grad = torch.ones_like(param)  # gradients are added to what is there
    return layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_are_those_of_plain_linear_layers(bias, deferred):
    tp_ctx = context(deferred)
    first, second = (filled(ColumnLinear(name, 6, 8, tp_ctx, init_std=1.0, bias=bias)) for name in "ab")
    row = filled(RowLinear("c", 8, 5, tp_ctx, init_std=1.0, bias=bias))
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    a, b = columns(x, first, second)
    row(a * b).square().sum().backward()
    if deferred:
        assert all(torch.equal(layer.weight.main_grad, torch.ones_like(layer.weight)) for layer in (first, second, row))
        tp_ctx.weight_grads.pop_deferred()()
    assert all(p.grad is None for layer in (first, second, row) for p in layer.parameters())
    ours = [x.grad, *(p.main_grad for layer in (first, second, row) for p in layer.parameters())]

    x.grad = None
    for layer in (first, second, row):
        for p in filled(layer).parameters():
            p.grad = torch.ones_like(p)
    a, b = F.linear(x, first.weight, first.bias), F.linear(x, second.weight, second.bias)
    F.linear(a * b, row.weight, row.bias).square().sum().backward()
    expected = [x.grad, *(p.grad for layer in (first, second, row) for p in layer.parameters())]
    for mine, plain in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_deferred_gradients_are_those_of_the_backward_pass_before():
    tp_ctx = context(deferred=True)
    layer = filled(ColumnLinear("a", 3, 3, tp_ctx, init_std=1.0))
    runs = []
    for scale in (1.0, 10.0):
        columns(torch.full((2, 3), scale, dtype=torch.float64), layer)[0].sum().backward()
        runs.append(tp_ctx.weight_grads.pop_deferred())
    runs[1]()
    assert torch.equal(layer.weight.main_grad, torch.full((3, 3), 21.0, dtype=torch.float64))
    runs[0]()
    assert torch.equal(layer.weight.main_grad, torch.full((3, 3), 23.0, dtype=torch.float64))


def test_the_input_gradient_is_sent_before_weight_gradients(monkeypatch):
    events: list[str] = []

    class Pending:
        def wait(self) -> None:
            events.append("dx arrived")

    def all_reduce(tensor: torch.Tensor, group: Any) -> Pending:
        events.append("dx sent")
        return Pending()

    class Recorded(WeightGrads):
        def compute_or_defer(self, weight: Parameter, dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
            events.append("dW")
            return super().compute_or_defer(weight, dy, x)

    tp_ctx = context()
    tp_ctx.weight_grads = Recorded()
    first, second = (filled(ColumnLinear(name, 6, 8, tp_ctx, init_std=1.0, bias=True)) for name in "ab")
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    a, b = columns(x, first, second)
    monkeypatch.setattr(tensor_parallel.comm, "all_reduce", all_reduce)
    (a * b).sum().backward()
    assert events == ["dx sent", "dW", "dW", "dx arrived"]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda grad, a, b, dtype, out: out.add_(a.float() @ b.float()), True),
        (lambda grad, a, b, dtype, out: out.copy_(a.float() @ b.float()), False),
        (mock.Mock(side_effect=RuntimeError("self must have the dtype of mat1")), False),
    ],
    ids=["adds", "overwrites", "raises"],
)
def test_an_operation_that_older_builds_do_not_have_right_is_tried_once(operation, expected, monkeypatch):
    """Cause: addmm with an fp32 sum of half-precision factors raises, or is wrong, in some builds."""
    adds_in_fp32.cache_clear()
    monkeypatch.setattr(torch.ops.aten.addmm, "dtype_out", operation, raising=False)
    assert adds_in_fp32(torch.bfloat16, torch.device("cpu")) is expected
    adds_in_fp32.cache_clear()
