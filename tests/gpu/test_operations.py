"""Operations that have code of their own for a GPU, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from internlm_lite.apps.bench.gpu.correctness import _LIMITS, _Case, kernels
from internlm_lite.batch import IGNORE
from internlm_lite.layers.compiled import compiled
from internlm_lite.layers.dropout import Dropout, Site, token_keys
from internlm_lite.layers.loss import LossOptions, linear_cross_entropy, losses_and_gradient
from internlm_lite.layers.rope import RopeFrequencies, Rotary, plain_frequencies
from internlm_lite.layers.weight_grads import add_product
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import tensor_parallel_context
from internlm_lite.optim.rules import RULES
from internlm_lite.optim.update_rule import Shard
from tests.layers.test_dropout import reference
from tests.layers.test_norm import norm
from tests.models.small import small_config
from tests.optim.test_rules import group_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative, of the whole tensor."""
    exact = expected.double().cpu()
    return ((found.double().cpu() - exact).norm() / exact.norm()).item()


def drawn(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(128, 8, 8), (64, 8, 2)])
def test_attention(dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, gpu: torch.device) -> None:
    """Every kernel, forward and backward, over documents of one token to several hundred; strides as in the model."""
    case = _Case(gpu, dtype, head_dim, heads, kv_heads)
    for backend in kernels(gpu, dtype, head_dim):
        forward, backward, _ = case.errors(backend)
        assert forward < _LIMITS[dtype] and backward < 2 * _LIMITS[dtype], backend


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_gradient_is_added_every_time(dtype: torch.dtype, device: torch.device) -> None:
    """Over many tokens: neither the product nor a sum of its parts is rounded to half precision on a GPU."""
    tokens = 8192 if device.type == "cuda" else 256
    dy, x = (drawn(tokens, n, dtype=dtype, device=device, seed=n) for n in (96, 64))
    grad = drawn(96, 64, dtype=torch.float32, device=device)
    expected = grad.double() + 2 * (dy.double().t() @ x.double())
    for _ in range(2):
        add_product(grad, dy, x)
    rounded = device.type == "cpu" and dtype != torch.float32
    assert error(grad, expected) < (4 * torch.finfo(dtype).eps if rounded else 2e-5)


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("capped", [False, True], ids=["plain", "bias, scale, cap, z-loss"])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_cross_entropy(
    dtype: torch.dtype, capped: bool, fused: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of several chunks of logits; a chunk may be shorter than the others."""
    monkeypatch.setattr("internlm_lite.layers.loss._CHUNK_BYTES", dict.fromkeys(("cpu", "cuda"), 1000 * 4 * 128))
    if device.type == "cpu":
        monkeypatch.setattr("internlm_lite.layers.compiled.COMPILER", "aot_eager")
    torch._dynamo.reset()
    hidden = drawn(300, 64, dtype=dtype, device=device).requires_grad_()
    weight = drawn(1000, 64, dtype=dtype, device=device, seed=1, scale=0.1).requires_grad_()
    labels = torch.arange(300, device=device) * 3
    labels[::7] = IGNORE
    bias = drawn(1000, dtype=dtype, device=device, seed=2).requires_grad_() if capped else None
    given = [x for x in (hidden, weight, bias) if x is not None]
    options = LossOptions(
        single_process_mesh().tp,
        0.1,
        *((1e-2, 0.7, 2.0) if capped else ()),
        fused=compiled(losses_and_gradient) if fused else None,
    )
    ours = linear_cross_entropy(hidden, weight, labels, torch.tensor(0.5, device=device), options, bias)
    grads = torch.autograd.grad(ours.scaled_sum, given)
    exact = [x.detach().double().requires_grad_() for x in given]
    logits = F.linear(*exact)
    logits = 2.0 * torch.tanh(logits * 0.7 / 2.0) if capped else logits
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum", ignore_index=IGNORE)
    of_z = 1e-2 * logits[labels != IGNORE].logsumexp(1).square().sum() if capped else 0.0
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert error(ours.train_loss_sum, loss.detach()) < limit
    for found, expected in zip(grads, torch.autograd.grad(0.5 * (loss + of_z), exact), strict=True):
        assert error(found, expected) < 2 * limit


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype: torch.dtype, device: torch.device) -> None:
    """Squares overflow float16."""
    layer = norm(dtype, size=256, device=device)
    x = drawn(50, 256, dtype=dtype, device=device, scale=500.0).requires_grad_()
    dy = drawn(50, 256, dtype=dtype, device=device, seed=1)
    y = layer(x)
    grads = torch.autograd.grad(y, (x, layer.weight), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, layer.weight)]
    expected = F.rms_norm(exact[0], (256,), exact[1], layer.eps)
    assert error(y, expected.detach()) < 4 * torch.finfo(dtype).eps
    for found, wanted in zip(grads, torch.autograd.grad(expected, exact, dy.double()), strict=True):
        assert error(found, wanted) < 8 * torch.finfo(dtype).eps


def test_rotation_of_far_positions(device: torch.device) -> None:
    positions = torch.tensor([0, 1, 4095, 10**6])
    x = drawn(4, 2, 2, 64, dtype=torch.float32, device=device)
    fast, exact = (RopeFrequencies(plain_frequencies(64, 10000.0, where)) for where in (device, torch.device("cpu")))
    found = Rotary(positions.to(device), fast, torch.float32)(x)
    assert error(found, Rotary(positions, exact, torch.float64)(x.double().cpu())) < 1e-6


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_dropout_has_the_bits_of_a_second_implementation(
    fused: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward; so a run may go on with other devices, or compiled."""
    if device.type == "cpu":
        monkeypatch.setattr("internlm_lite.layers.compiled.COMPILER", "aot_eager")
    torch._dynamo.reset()
    config = small_config(dtype="torch.float32", compile=fused)
    tp_ctx = tensor_parallel_context(config, single_process_mesh(device), by_sequence=False)
    rows = torch.tensor([1, 2**21 + 3], device=device)
    for row, keys in zip(rows.tolist(), token_keys(7, 11, rows, 600), strict=True):
        x = torch.ones(600, 512, device=device, requires_grad=True)
        y = Dropout(0.3, 5, Site.FEED_FORWARD, 512, tp_ctx)(x, keys)
        y.backward(torch.ones_like(y))
        assert x.grad is not None
        numbers = row * 600 + np.arange(600)[:, None]
        expected = reference(0.3, 7, 11, 5, Site.FEED_FORWARD, numbers, np.arange(512))
        for found in (y, x.grad):
            assert np.array_equal((found == 0).cpu().numpy(), expected)


@pytest.mark.parametrize("rule", RULES)
def test_update(rule: str, device: torch.device) -> None:
    """Three updates and one that is skipped, against the CPU in float64."""

    def updated(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        weights = [drawn(512, dtype=dtype, device=device, seed=n) for n in (0, 1)]
        groups = [group_of(rule, decays) for decays in (True, False)]
        made = [
            RULES[rule]([Shard(w, {role: torch.zeros_like(w) for role in RULES[rule].roles_with(group)})], group)
            for w, group in zip(weights, groups, strict=True)
        ]
        for step in range(4):
            grads = [drawn(512, dtype=dtype, device=device, seed=10 + 2 * step + n) for n in (0, 1)]
            lr = torch.tensor(1e-2, dtype=torch.float64, device=device)
            for one, grad in zip(made, grads, strict=True):
                one.update([grad], lr, 0.95, torch.tensor(step == 2, device=device))
        return torch.cat(weights)

    assert error(updated(device, torch.float32), updated(torch.device("cpu"), torch.float64)) < 1e-6
