"""Peak rates of the device, and the operations that a training step consists of."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F

from internlm_lite.apps.bench.gpu.correctness import installed, kernels
from internlm_lite.apps.bench.gpu.measurement import Check
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.layers.flash import AttentionBackend, packed
from internlm_lite.layers.fp8 import has_float8, scaled, scaled_product
from internlm_lite.layers.loss import LossOptions, linear_cross_entropy
from internlm_lite.layers.rope import RopeFrequencies, Rotary, plain_frequencies
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import single_process_mesh


def operations(check: Check) -> None:
    """Time, and FLOP/s or bandwidth, of products, copies, weight gradients, norm, SwiGLU, head and loss, rotary."""
    tokens, hidden, width, vocab = (64, 32, 64, 512) if check.smoke else (8192, 2048, 5504, 50304)
    with torch.device(check.device):
        _ceilings(check)
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
        _weight_gradient(check, torch.randn(tokens, width, dtype=torch.bfloat16), x)
        _elementwise(check, x, width)
        _head(check, x.requires_grad_(), vocab)
        rotary = Rotary(torch.arange(tokens), RopeFrequencies(plain_frequencies(hidden // 16, 10000.0)), torch.bfloat16)
        q = torch.randn(tokens, 16, 1, hidden // 16, dtype=torch.bfloat16)
        _bandwidth(check, "rotary of the queries", lambda: rotary(q), 2 * q.nbytes)
    check.tell("; ".join(check.found["notes"][:2]))


def _bandwidth(check: Check, name: str, call: Callable[[], object], least_bytes: int) -> None:
    milliseconds = check.milliseconds(call)
    check.note(f"{name}: {milliseconds * 1e3:.0f} us = {least_bytes / milliseconds / 1e9:.2f} TB/s of the least bytes")


def _ceilings(check: Check) -> None:
    n = 256 if check.smoke else 8192
    a, b = torch.randn(n, n, dtype=torch.bfloat16), torch.randn(n, n, dtype=torch.bfloat16)
    check.note(f"bf16 product {n}^3: {2 * n**3 / check.milliseconds(lambda: a @ b) / 1e9:.0f} TFLOP/s")
    if has_float8(a.device):
        x, w = scaled(a, torch.float8_e4m3fn), scaled(b, torch.float8_e4m3fn)
        for fast in (True, False):
            taken = check.milliseconds(partial(scaled_product, x, w, fast=fast))
            check.note(f"float8 product {n}^3, fast sums {fast}: {2 * n**3 / taken / 1e9:.0f} TFLOP/s")
        _bandwidth(check, "cast to float8", lambda: scaled(a, torch.float8_e4m3fn), 5 * a.numel())
    source = torch.empty(1 << 20 if check.smoke else 1 << 30)
    target = torch.empty_like(source)
    _bandwidth(check, "copy", lambda: target.copy_(source), 2 * source.nbytes)


def _weight_gradient(check: Check, dy: torch.Tensor, x: torch.Tensor) -> None:
    gradient = torch.zeros(dy.shape[1], x.shape[1])
    taken = check.milliseconds(lambda: gradient.add_((dy.t() @ x).float()))
    check.note(f"weight gradient {list(gradient.shape)}: product, cast and add {taken:.3f} ms")
    if check.smoke:  # the operator exists only for CUDA
        return
    expected = dy.t().float() @ x.float()
    added = torch.ops.aten.addmm.dtype_out
    zero = torch.zeros_like(gradient)
    added(zero, dy.t(), x, torch.float32, out=zero)
    error = ((zero - expected).norm() / expected.norm()).item()
    taken = check.milliseconds(lambda: added(gradient, dy.t(), x, torch.float32, out=gradient))
    check.note(f"  added in the product {taken:.3f} ms, relative error against fp32 {error:.1e}")


def _elementwise(check: Check, x: torch.Tensor, width: int) -> None:
    leaf, weight = x.clone().requires_grad_(), torch.ones(x.shape[1], dtype=x.dtype, requires_grad=True)
    y = F.rms_norm(leaf, (x.shape[1],), weight, 1e-5)
    dy = torch.randn_like(y)
    _bandwidth(check, "rms_norm", lambda: F.rms_norm(x, (x.shape[1],), weight, 1e-5), 2 * x.nbytes)
    backward = lambda: torch.autograd.grad(y, (leaf, weight), dy, retain_graph=True)  # noqa: E731
    _bandwidth(check, "  backward", backward, 3 * x.nbytes)
    gate, up = (torch.randn(x.shape[0], width, dtype=x.dtype, requires_grad=True) for _ in range(2))
    z = F.silu(gate) * up
    dz = torch.randn_like(z)
    _bandwidth(check, "silu(gate) * up", lambda: F.silu(gate) * up, 3 * z.nbytes)
    _bandwidth(check, "  backward", lambda: torch.autograd.grad(z, (gate, up), dz, retain_graph=True), 5 * z.nbytes)


def _head(check: Check, x: torch.Tensor, vocab: int) -> None:
    weight = torch.randn(vocab, x.shape[1], dtype=x.dtype).mul_(0.02).requires_grad_()
    labels, one = torch.randint(vocab, (x.shape[0],)), torch.ones(())
    group, flops = single_process_mesh(check.device).tp, 6 * x.numel() * vocab

    def ours() -> None:
        linear_cross_entropy(x, weight, labels, one, LossOptions(group)).scaled_sum.backward()

    sides = {"ours": ours}
    if installed("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        sides["liger"] = lambda: LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels)[0].backward()
    for name, call in sides.items():
        taken = check.milliseconds(call, 2, 5)
        check.note(f"head and loss, {name}: {taken:.2f} ms forward and backward = {flops / taken / 1e9:.0f} TFLOP/s")


def attention_speed(check: Check) -> None:
    """Attention of one layer over documents of equal length, over 64 of mixed lengths, and over long and short ones."""
    tokens, heads, head_dim = (256, 4, 32) if check.smoke else (8192, 16, 128)
    quarter = tokens // 4
    mixed = sorted({(i * i * tokens) // 4096 for i in range(1, 64)})
    rows = {
        "4 equal": [0, quarter, 2 * quarter, 3 * quarter, tokens],
        "64 mixed": [0, *mixed, tokens],
        "2 long, 64 short": [0, quarter, *(quarter + n * tokens // 128 for n in range(1, 65)), tokens],
    }
    for label, boundaries in rows.items():
        flops = sum(2 * heads * head_dim * (stop - start) ** 2 for start, stop in pairwise(boundaries))
        for backend in kernels(check.device, torch.bfloat16, head_dim):
            q, k, v = (
                torch.randn(tokens, heads, head_dim, device=check.device, dtype=torch.bfloat16, requires_grad=True)
                for _ in range(3)
            )
            attend = _kernel(backend, boundaries, check.device)
            try:
                forward, backward = _both_ways(check, attend, (q, k, v))
            except RuntimeError as error:
                check.note(f"{backend.name} {label}: {str(error)[:200]}")
                continue
            check.note(
                f"{backend.name:13s} {label}: forward {forward:.3f} ms = {flops / forward / 1e9:.0f} TFLOP/s, "
                f"backward {backward:.3f} ms = {2.5 * flops / backward / 1e9:.0f} TFLOP/s"
            )
    check.tell(check.found["notes"][0])


def _both_ways(check: Check, attend: Callable[..., torch.Tensor], qkv: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """(milliseconds of the forward pass, milliseconds of the backward pass)"""
    y = attend(*qkv)
    dy = torch.randn_like(y)
    backward = check.milliseconds(lambda: torch.autograd.grad(y, qkv, dy, retain_graph=True))
    return check.milliseconds(lambda: attend(*qkv)), backward


def _kernel(backend: AttentionBackend, boundaries: Sequence[int], device: torch.device) -> Callable[..., torch.Tensor]:
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
    longest = max(stop - start for start, stop in pairwise(boundaries))
    attend = packed(backend, cu_seqlens, tuple(boundaries), longest)
    return lambda q, k, v: attend(AttentionRule(), q, k, v)


def staging(check: Check) -> None:
    """Seconds to copy 12 GB to host memory, as a save does beside the next step."""
    size = 1 << 20 if check.smoke else 1 << 28
    parts = [torch.randn(size, device=check.device) for _ in range(2 if check.smoke else 12)]
    gigabytes = sum(part.nbytes for part in parts) / 1e9
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else check.scratch
    for name, folder in (("memory", None), ("/dev/shm", shared / f"gpu_check_{check.scratch.name}")):
        stage = Staging(folder, check.device)
        begin = time.perf_counter()
        stage.reserve(parts)
        reserved, seconds, copies = time.perf_counter() - begin, [], None
        for _ in range(3):
            check.synchronize()
            begin = time.perf_counter()
            copies = stage.copy(parts)
            stage.wait_copied()
            seconds.append(time.perf_counter() - begin)
        right = copies is not None and all(
            torch.equal(copy[::4097], part.cpu()[::4097]) for copy, part in zip(copies, parts, strict=True)
        )
        check.note(
            f"{name}: {gigabytes:.1f} GB reserved in {reserved:.2f} s, copied in {min(seconds):.3f} s "
            f"= {gigabytes / min(seconds):.1f} GB/s"
        )
        if not right:
            check.wrong(f"{name}: the copy differs from what was copied")
        stage.close()
    check.tell(check.found["notes"][0])
