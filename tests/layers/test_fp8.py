"""Products in float8: every rounding against a reference in fp64, forward and backward, on the CPU and on a GPU."""

from __future__ import annotations

import math
from unittest.mock import Mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from internlm_lite.errors import ConfigError
from internlm_lite.layers.fp8 import Float8Products, require_float8, scaled, scaled_product
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.layers.weight_grads import WeightGrads
from internlm_lite.mesh.mesh import single_process_mesh

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
"""dtype -> bits of the mantissa, least exponent of a full mantissa, largest number."""
BF16 = 2.0**-8
"""Relative error of rounding to bf16, and as much again for sums in fp32."""


def reference(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x in fp64, rounded to the nearest number that is a float8 times the scale of x."""
    bits, least, top = FORMATS[dtype]
    x = x.double()
    scale = 2.0 ** math.floor(math.log2(top / max(x.abs().max().item(), 2.0**-64)))
    magnitude = (x * scale).abs()
    exponent = magnitude.clamp(min=2.0**-200).log2().floor().clamp(min=least)
    step = 2.0 ** (exponent - bits)
    return (magnitude / step).round() * step * x.sign() / scale  # `round` takes the even one of two as near


def sample(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Magnitudes over thirty binary orders, a row and a column of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2.0 ** torch.randint(-30, 1, shape, generator=generator)
    x[-1], x[:, -1] = 0, 0
    return x.to(dtype)


INPUTS = {
    "zeros": torch.zeros(4, 16),
    "one row of zeros": torch.tensor([[0.0, 0.0], [1.0, -3.0]]),
    "huge": torch.tensor([[3.0e38, -1.0e38], [1.0, 0.0]]),
    "tiny": torch.tensor([[1e-25, -3e-26], [1e-30, 0.0]]),
    "subnormal in bf16": torch.tensor([[1e-39, -3e-40]]),
    "subnormal in float8": 2.0 ** -torch.arange(40.0).view(8, 5),
    "the largest numbers": torch.tensor([[448.0, 447.9, 57344.0, 464.0, 1.0]]),
    "halves between two": torch.arange(-33.0, 33.0).view(6, 11) / 2,
    "odd shape": sample((7, 5), 1, torch.float32),
    "a column": sample((33, 1), 2, torch.float32) + 1,
    "many": sample((64, 48), 3, torch.float32),
}


@pytest.mark.parametrize("float8", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_only_rounding_is_that_of_the_cast(float8: torch.dtype, dtype: torch.dtype) -> None:
    for name, values in INPUTS.items():
        x = values.to(dtype)
        for variant in (x, x.t(), x[:1].expand(3, -1)):  # as gradients come: transposed, or one row for all
            made = scaled(variant, float8)
            assert made.values.dtype == float8 and made.values.is_contiguous() and made.inverse.dtype == torch.float32
            mantissa, _ = math.frexp(made.inverse.item())
            assert mantissa == 0.5, "a power of two"
            assert torch.equal(made.values.double() * made.inverse.double(), reference(variant, float8)), name


def test_zeros_give_zeros() -> None:
    """A scale of 1 / 0 would make NaN of a row of padding (torchao 4762, 3356)."""
    none, some = scaled(torch.zeros(8, 16).bfloat16(), E5M2), scaled(sample((24, 16), 2), E4M3)
    assert torch.equal(scaled_product(none, some), torch.zeros(8, 24).bfloat16())
    assert torch.equal(scaled_product(some, none), torch.zeros(24, 8).bfloat16())


def close(ours: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> bool:
    """Equal to a rounding of the result to bf16 and one of the sum of the terms' magnitudes to fp32."""
    return bool(((ours.double() - exact).abs() <= exact.abs() * BF16 + terms * 2.0**-18).all())


def context(deferred: bool = False) -> TensorParallelContext:
    products = Float8Products()
    grads = WeightGrads(deferred=deferred, add=products.add_weight_grad)
    mesh, cpu = single_process_mesh(), torch.device("cpu")
    return TensorParallelContext(mesh.tp, torch.bfloat16, cpu, products=products, weight_grads=grads)


@pytest.mark.parametrize("tokens", [16, 7])
@pytest.mark.parametrize("how", ["added", "deferred", "returned"])
def test_a_layer_computes_what_the_rounded_operands_give(how: str, tokens: int) -> None:
    tp_ctx = context(how == "deferred")
    pair = [ColumnLinear(name, 48, 32, tp_ctx, init_std=1.0, bias=True) for name in "ab"]
    row = RowLinear("c", 32, 80, tp_ctx, init_std=1.0)
    for seed, layer in enumerate((*pair, row)):
        layer.weight.data.copy_(sample(tuple(layer.weight.shape), seed))
        if layer.bias is not None:
            layer.bias.data.fill_(0.25)
            layer.bias.main_grad = torch.zeros(32)
        if how != "returned":
            layer.weight.main_grad = torch.ones(layer.weight.shape)  # gradients are added to what is there
    x, z = sample((tokens, 48), 5).requires_grad_(), sample((tokens, 32), 6).requires_grad_()
    dys = [sample((tokens, width), seed) for seed, width in ((7, 32), (8, 32), (9, 80))]
    ys = [*columns(x, *pair), row(z)]
    torch.autograd.backward(ys, dys)
    if how == "deferred":
        tp_ctx.weight_grads.pop_deferred()()

    layers, inputs = (*pair, row), (x, x, z)
    weights = [reference(layer.weight.detach(), E4M3) for layer in layers]
    operands, grads = [reference(t.detach(), E4M3) for t in inputs], [reference(dy, E5M2) for dy in dys]
    for y, layer, w, a in zip(ys, layers, weights, operands, strict=True):
        product, shift = a @ w.t(), 0 if layer.bias is None else layer.bias.double()
        assert close(y, product + shift, a.abs() @ w.abs().t() + product.abs() * 2**10)  # rounded before the bias, too
    for layer, a, dy in zip(layers, operands, grads, strict=True):
        found = layer.weight.grad if how == "returned" else layer.weight.main_grad - 1
        assert (layer.weight.grad is None) == (how != "returned")
        slack = 0 if how == "returned" else 2.0**-6  # of the one that was there
        assert close(found, dy.t() @ a, dy.abs().t() @ a.abs() + slack)
    first, second = (g @ w for g, w in zip(grads, weights, strict=True) if w.shape[1] == 48)
    assert close(x.grad, first + second, 2**10 * (first.abs() + second.abs()))
    assert close(z.grad, grads[2] @ weights[2], grads[2].abs() @ weights[2].abs())


def test_evaluation_and_generation_use_the_weights_as_they_are() -> None:
    layer = ColumnLinear("a", 16, 32, context(), init_std=1.0)
    x = sample((5, 16), 1)
    layer.weight.data.copy_(sample((32, 16), 2))
    with torch.no_grad():
        assert torch.equal(columns(x, layer)[0], x @ layer.weight.t())
    assert not torch.equal(columns(x, layer)[0], x @ layer.weight.t())


def test_a_gpu_gets_the_layouts_that_its_kernel_takes() -> None:
    """Row-major times column-major, multiples of 16: on fake tensors of a GPU, whose operator checks them."""
    products = Float8Products()
    with FakeTensorMode(allow_non_fake_inputs=True):
        gpu = {"device": "cuda", "dtype": torch.bfloat16}
        x, w, main = torch.empty(64, 48, **gpu), torch.empty(112, 48, **gpu), torch.empty(112, 48, device="cuda")
        y = products.output(products.operand(x), w, torch.empty(112, **gpu))
        dy = products.gradient(y)
        assert y.shape == (64, 112) and products.input_grad([dy, dy], [w, w]).shape == x.shape
        products.add_weight_grad(main, dy, products.operand(x))
        for odd in (torch.empty(64, 40, **gpu), torch.empty(64, 48, **gpu)):  # the contracted side, then the outer one
            with pytest.raises(RuntimeError, match="divisible by 16"):
                products.output(products.operand(odd), torch.empty(104, odd.shape[1], **gpu))


@pytest.mark.parametrize(("capability", "fine"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_older_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fine: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", Mock(return_value=capability))
    monkeypatch.setattr(torch.cuda, "get_device_name", Mock(return_value="NVIDIA A100"))
    require_float8(torch.device("cpu"))
    if fine:
        require_float8(torch.device("cuda", 0))
    else:
        with pytest.raises(ConfigError, match=r"model.fp8=True: found NVIDIA A100, expected .* 8.9 .*H100"):
            require_float8(torch.device("cuda", 0))


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="float8 kernels need a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("left", FORMATS, ids=str)
def test_products_on_every_device(left: torch.dtype, device: str) -> None:
    for rows, outer, inner in ((16, 16, 16), (7, 48, 80), (256, 512, 1024)):
        pair = (sample((rows, inner), 1), left), (sample((outer, inner), 2), E4M3)
        ours, (a, b) = [scaled(x.to(device), dtype) for x, dtype in pair], [reference(*one) for one in pair]
        for one, expected in zip(ours, (a, b), strict=True):
            assert torch.equal(one.values.double().cpu() * one.inverse.double().cpu(), expected)
        for fast in (False, True):
            found = scaled_product(*ours, fast=fast).cpu()
            assert close(found, a @ b.t(), a.abs() @ b.abs().t() * (2.0**8 if fast else 1.0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_not_finite_stays_so(bad: float, compiled: bool, device: str) -> None:
    """Else an overflow would be trained on: the norm of the gradient decides whether a step is skipped. On a GPU the
    casts of compiled code make the largest number of an infinity."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    cast = torch.compile(scaled, backend=backend, dynamic=False) if compiled else scaled
    a, b, c = sample((16, 32), 1), sample((48, 32), 2), sample((48, 16), 3)
    a[3, 5] = bad
    for float8 in FORMATS:
        broken, rows, columns_ = (cast(x.to(device), dtype) for x, dtype in ((a, float8), (b, E4M3), (c, E4M3)))
        assert not scaled_product(broken, rows)[3].isfinite().any()
        assert not scaled_product(broken.transposed(), columns_)[5].isfinite().any()
