"""Norms against their formulas and against torch's; the bits of half precision; features split over ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from internlm_lite.layers.costs import RowShape
from internlm_lite.layers.norm import NORMS, FullRMSNorm, Norm, SampleLayerNorm, build_norm, full_norms
from internlm_lite.layers.tensor_parallel import TensorParallelContext
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from tests.apps.planner.test_passes import Traffic
from tests.models.counted import saved_bytes
from tests.models.small import small_config
from tests.world import run_world

HALF = (torch.bfloat16, torch.float16)


def norm(dtype: torch.dtype, size: int = 12, device: str = "cpu", **changes: Any) -> Norm:
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device(device))
    made = build_norm("norm", small_config(hidden_size=size, **changes), tp_ctx)
    with torch.no_grad():
        for param in made.parameters():
            param.copy_(torch.linspace(0.5, 1.5, size))
    return made


def expected(layer: Norm, x: torch.Tensor) -> torch.Tensor:
    """By torch, in float64."""
    weight, shape = layer.weight.double() + layer.offset, (x.shape[-1],)
    if isinstance(layer, SampleLayerNorm):  # as the annotated transformer
        exact, bias = x.double(), 0 if layer.bias is None else layer.bias.double()
        return weight * (exact - exact.mean(-1, keepdim=True)) / (exact.std(-1, keepdim=True) + layer.eps) + bias
    if layer.bias is None and layer.statistics == 1:
        return F.rms_norm(x.double(), shape, weight, layer.eps)
    return F.layer_norm(x.double(), shape, weight, None if layer.bias is None else layer.bias.double(), layer.eps)


KINDS: list[dict[str, Any]] = [
    {},
    {"zero_centered_norm": True},
    {"norm_type": "layernorm"},
    {"norm_type": "layernorm", "norm_bias": False, "zero_centered_norm": True},
    {"norm_type": "sample_layernorm"},
    {"norm_type": "sample_layernorm", "norm_bias": False, "zero_centered_norm": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_gradients_are_right(kind: dict[str, Any]) -> None:
    layer = norm(torch.float64, **kind)
    assert (layer.bias is not None) == ("norm_type" in kind and kind.get("norm_bias", True))
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))
    torch.testing.assert_close(layer(x), expected(layer, x), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("fp32_weight", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_half_precision_is_float32_inside(kind: dict[str, Any], dtype: torch.dtype, fp32_weight: bool) -> None:
    layer = norm(dtype, use_fp32_norm=fp32_weight, **kind)
    assert {param.dtype for param in layer.parameters()} == {torch.float32 if fp32_weight else dtype}
    x = (torch.randn(5, 12) * 500).to(dtype).requires_grad_()  # squares overflow float16
    dy = torch.randn(5, 12).to(dtype)
    y = layer(x)
    y.backward(dy)
    assert y.dtype == x.grad.dtype == dtype and layer.weight.grad.dtype == layer.weight.dtype
    exact, mine = x.detach().double().requires_grad_(), [param.grad.double() for param in layer.parameters()]
    wanted = expected(layer, exact)
    layer.zero_grad()
    wanted.backward(dy.double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), wanted.detach(), rtol=eps, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=eps, atol=eps / 500)
    for found, param in zip(mine, layer.parameters(), strict=True):
        torch.testing.assert_close(found, param.grad.double(), rtol=2 * eps, atol=4 * eps)


def test_one_is_added_to_a_weight_in_float32() -> None:
    """15.8125 + 1 is 16.75 in bf16. The row has a mean square of 1, so its output is the gain."""
    layer = norm(torch.bfloat16, size=4, zero_centered_norm=True, layer_norm_epsilon=1e-30)
    with torch.no_grad():
        layer.weight.fill_(15.8125)
    x = torch.tensor([[1.0, -1.0, 1.0, 1.0]], dtype=torch.bfloat16)
    assert (layer.weight + 1)[0] == 16.75 and layer(x).abs().eq(16.8125).all()


def test_half_precision_is_rounded_once() -> None:
    """The bits of transformers' norms that multiply before they cast; Llama's casts before, and may be a bit off."""
    transformers = pytest.importorskip("transformers")
    olmo2, gemma2, llama = (
        getattr(getattr(transformers.models, name.lower()), f"modeling_{name.lower()}").__dict__[f"{name}RMSNorm"]
        for name in ("Olmo2", "Gemma2", "Llama")
    )
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = {}
    for name, theirs in (("olmo2", olmo2), ("gemma2", gemma2), ("llama", llama)):
        layer = norm(torch.bfloat16, size=256, zero_centered_norm=name == "gemma2")
        other = theirs(256, eps=layer.eps).bfloat16()
        other.weight.data.copy_(layer.weight)
        found[name] = (layer(x) != other(x)).sum().item()
    assert found["olmo2"] == found["gemma2"] == 0 < found["llama"]


def full_run(mesh: Mesh) -> list[torch.Tensor]:
    """Outputs and gradients of two norms over all features, of this rank's heads: 4 of queries, 2 of keys."""
    tp_ctx = TensorParallelContext(mesh.tp, torch.float64, torch.device("cpu"))
    config = small_config(zero_centered_norm=True, layer_norm_epsilon=0.1)
    norms = [FullRMSNorm(f"{heads}", config, tp_ctx, heads=(heads, 6)) for heads in (4, 2)]
    generator, found, xs = torch.Generator().manual_seed(0), list[torch.Tensor](), list[torch.Tensor]()
    dys: list[torch.Tensor] = []
    for layer, heads in zip(norms, (4, 2), strict=True):
        x, dy = (torch.randn(7, heads, 6, dtype=torch.float64, generator=generator) for _ in range(2))
        weight, own = (
            torch.randn(heads * 6, dtype=torch.float64, generator=generator),
            slice(*layer.weight.shard_spec.box[0]),
        )
        layer.weight.data.copy_(weight[own])
        xs.append(x.flatten(1)[:, own].view(7, -1, 6).requires_grad_())
        dys.append(dy.flatten(1)[:, own].view(7, -1, 6))
    ys = full_norms(xs, norms)
    torch.autograd.backward(ys, dys)
    for x, y, layer in zip(xs, ys, norms, strict=True):
        found += [y.detach().flatten(1), x.grad.flatten(1), layer.weight.grad[None]]
    return found


def test_norms_over_all_heads_do_not_depend_on_the_split() -> None:
    """The mean is over the heads of all ranks; a rank's own would give other numbers, and gradients off by a part."""
    whole = full_run(single_process_mesh())
    parts = run_world(full_run, 2, tensor=2)
    for alone, *split in zip(whole, *parts, strict=True):
        torch.testing.assert_close(torch.cat(split, dim=1), alone, rtol=1e-12, atol=1e-14)


def test_norms_over_all_heads_have_the_right_gradient() -> None:
    tp_ctx = TensorParallelContext(single_process_mesh().tp, torch.float64, torch.device("cpu"))
    layer = FullRMSNorm("n", small_config(), tp_ctx, heads=(2, 6))
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(5, 3, 2, 6, dtype=torch.float64)[:, 1].requires_grad_()  # a view
    assert torch.autograd.gradcheck(lambda x, _: full_norms((x,), (layer,))[0], (x, layer.weight))
    wanted = F.rms_norm(x.flatten(1), (12,), layer.weight, layer.eps).view(x.shape)
    torch.testing.assert_close(full_norms((x,), (layer,))[0], wanted, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_norms_over_all_heads_move_what_they_say(dtype: torch.dtype) -> None:
    tp_ctx = TensorParallelContext(single_process_mesh().tp, dtype, torch.device("cpu"))
    layer = FullRMSNorm("n", small_config(), tp_ctx, heads=(8, 64))
    layer.weight.data.fill_(1)
    x, dy = (torch.randn(256, 8, 64).to(dtype) for _ in range(2))
    with Traffic() as forward:
        (y,) = full_norms((x.requires_grad_(),), (layer,))
    with Traffic() as backward:
        y.backward(dy)
    found = [forward.n_bytes, backward.n_bytes]
    said = [sum(one.n_bytes for one in layer.passes(RowShape(256)) if one.backward == back) for back in (False, True)]
    assert said == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("kind", NORMS)
def test_a_weight_that_starts_zero_centred_gives_the_same_norm(kind: str) -> None:
    """Its initial value follows: 1 + 0 is the gain of a plain weight of 1."""
    fills = []
    for flag in (False, True):
        layer = norm(torch.float32, norm_type=kind, zero_centered_norm=flag)
        fills.append(layer.weight.shard_spec.fill + layer.offset)
    assert fills == [1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA has its own kernel")
@pytest.mark.parametrize("fp32_weight", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_bytes_on_a_gpu(fp32_weight: bool, kind: dict[str, Any]) -> None:
    """torch's kernel for RMSNorm with an fp32 gain keeps the fp32 copy of its input, and not the input."""
    layer = norm(torch.bfloat16, device="cuda", use_fp32_norm=fp32_weight, **kind)
    x = torch.randn(5, 12, device="cuda").bfloat16().requires_grad_()
    gain = 4 * 12 if layer.offset and layer.statistics == 1 else 0  # 1 + weight
    assert saved_bytes(lambda: layer(x), layer) == gain + sum(layer.saved_bytes(RowShape(5, "cuda")).values())


@pytest.mark.parametrize("fp32", [False, True])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_parameters_are_sums_in_fp32_over_many_tokens(dtype: torch.dtype, kind: str, fp32: bool) -> None:
    """Added in half precision, thousands of numbers lose more than half of their sum."""
    layer = norm(dtype, norm_type=kind, use_fp32_norm=fp32).requires_grad_()
    generator = torch.Generator().manual_seed(2)
    x, dy = ((torch.randn(8192, 12, generator=generator) + shift).to(dtype) for shift in (0, 0.5))
    params = list(layer.parameters())
    for param in params:
        param.main_grad = torch.zeros(param.shape)  # type: ignore[attr-defined]
    layer(x.requires_grad_()).backward(dy)
    exact = norm(torch.float64, norm_type=kind).requires_grad_()
    exact(x.detach().double()).backward(dy.double())
    for param, right in zip(params, exact.parameters(), strict=True):
        error = (param.main_grad - right.grad).norm() / right.grad.norm()  # type: ignore[attr-defined,operator,union-attr]
        assert error < (1e-5 if fp32 else torch.finfo(dtype).eps)
