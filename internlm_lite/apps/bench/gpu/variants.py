"""Possible optimizations of the training step, as patches, to be measured before they are implemented.

Variants are combined by "+": "islands+wgrad". "eager" is the unchanged step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.layers import flash, linear, loss, mlp, norm, rope, weight_grads
from internlm_lite.mesh.layout import ShardSpec
from internlm_lite.models import decoder, initialise


def apply(variant: str, smoke: bool) -> None:
    """Patch the modules of this process. Raises KeyError for an unknown name."""
    _put(initialise, "_drawn", _quickly_drawn)
    for name in variant.split("+"):
        VARIANTS[name](smoke)


def with_recomputation(config: Config, variant: str) -> Config:
    """The config, with recomputed activations if the variant includes `recompute`."""
    if "recompute" not in variant.split("+"):
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"checkpoint": True})})


def _quickly_drawn(layout: ShardSpec, std: float, seed: int) -> Iterator[tuple[tuple[slice, ...], Any]]:
    """Quick random weights; the normal initialisation of a 7B model takes a minute."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(zlib.crc32(layout.name.encode()))
    rows = torch.randn(layout.local_shape, device=device, generator=generator).mul_(std)
    yield (slice(None),), rows.cpu().numpy()


def _nothing(smoke: bool) -> None:
    """No patch: `eager`, `recompute` and `bare` are handled elsewhere."""


def _compile(function: Callable[..., Any], smoke: bool, **options: Any) -> Callable[..., Any]:
    """torch.compile; a smoke run only traces, as the C++ compiler would take minutes."""
    return torch.compile(function, dynamic=False, backend="aot_eager" if smoke else "inductor", **options)


def _islands(smoke: bool) -> None:
    """SwiGLU and rotary compiled to one kernel each."""
    swiglu = _compile(lambda gate, up: F.silu(gate) * up, smoke)
    rotate = _compile(lambda x, cos, sin: x * cos + x.roll(x.shape[-1] // 2, -1) * sin, smoke)

    def forward(self: mlp.SwiGLU, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear.columns(x, self.w1, self.w3)
        out: torch.Tensor = self.w2(swiglu(gate, up))
        return out

    _put(mlp.SwiGLU, "forward", forward)
    _put(rope.Rotary, "__call__", lambda self, x: rotate(x, self.cos, self.signed_sin))


def _block(smoke: bool) -> None:
    """Compile whole blocks. The layer index, an int attribute, must not become a constant of the graph."""
    torch._dynamo.config.allow_unspec_int_on_nn_module = True
    compiled = _compile(decoder.Block._run, smoke, fullgraph=True)

    def run(self: nn.Module, *args: Any) -> Any:
        # Dynamo refuses a weight whose gradient has another dtype, so the gradient is hidden during the call.
        parameters = list(self.parameters())
        gradients = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = None
        try:
            return compiled(self, *args)
        finally:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient

    _put(decoder.Block, "_run", run)


def _wgrad(smoke: bool) -> None:
    """The matrix product of a weight gradient accumulates into the fp32 buffer. CUDA only."""
    if smoke:
        return

    def compute(self: weight_grads.WeightGrads, weight: nn.Parameter, dy: torch.Tensor, x: torch.Tensor) -> None:
        torch.ops.aten.addmm.dtype_out(weight.grad, dy.t(), x, torch.float32, out=weight.grad)

    _put(weight_grads.WeightGrads, "compute_or_defer", compute)


def _loss(smoke: bool) -> None:
    """Compile the elementwise operations on a chunk of logits."""
    _put(loss, "_chunk_losses", _compile(loss._chunk_losses, smoke))


def _cudnn(smoke: bool) -> None:
    """cuDNN's kernel for documents of different lengths, called through jagged nested tensors."""
    if not smoke:
        _put(flash, "_packed_torch_varlen", cudnn_varlen)


def cudnn_varlen(cu_seqlens: torch.Tensor, longest: int) -> Callable[..., torch.Tensor]:
    """Attention inside each document; inputs and output [T, heads, head_dim]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def jagged(x: torch.Tensor) -> torch.Tensor:
        nested = torch.nested.nested_tensor_from_jagged(x.contiguous(), cu_seqlens, min_seqlen=1, max_seqlen=longest)
        return nested.transpose(1, 2)

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x for x in (k, v))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(jagged(q), jagged(k), jagged(v), is_causal=True)
        values: torch.Tensor = out.transpose(1, 2).values()
        return values

    return attend


def _liger(smoke: bool) -> None:
    """Replace RMSNorm and SwiGLU by those of liger-kernel."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def forward(self: mlp.SwiGLU, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear.columns(x, self.w1, self.w3)
        out: torch.Tensor = self.w2(LigerSiLUMulFunction.apply(gate, up))
        return out

    _put(mlp.SwiGLU, "forward", forward)
    _put(
        norm.RMSNorm,
        "forward",
        lambda self, x: LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False),
    )


def _bare_compiled(smoke: bool) -> None:
    from internlm_lite.apps.bench import bare

    _put(bare.BareBlock, "forward", _compile(bare.BareBlock.forward, smoke))


def _put(owner: Any, name: str, value: Any) -> None:
    """setattr that raises AttributeError if `owner` has no `name`: the patch would have no effect."""
    getattr(owner, name)
    setattr(owner, name, value)


VARIANTS: dict[str, Callable[[bool], None]] = {
    "eager": _nothing,
    "bare": _nothing,
    "recompute": _nothing,
    "compiled": _bare_compiled,
    "islands": _islands,
    "block": _block,
    "wgrad": _wgrad,
    "loss": _loss,
    "cudnn": _cudnn,
    "liger": _liger,
}
