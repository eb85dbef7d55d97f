"""Normalisation of each token's features; `build_norm` chooses the model's norm.

    RMSNorm   y = x / sqrt(mean(x^2) + eps) * w   (arXiv:1910.07467)

On CUDA `F.rms_norm` is a fused kernel. On the CPU its backward pass is a chain of autograd nodes, so a hand-written
gradient is used there: forward plus backward 3.6 times as fast at [2048, 256] fp32.

    with n = x / rms, p = dy * n:   dw = sum_t p,   dx = (dy * w - n * (p . w) / d) / rms
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, RowShape
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype
from internlm_lite.layers.weight_grads import accumulating
from internlm_lite.mesh.layout import parameter, whole


class _RMSNorm(torch.autograd.Function):
    """x [..., d], weight [d] -> [..., d] in the dtype of x; half precision is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        exact = x.to(accumulation_dtype(x.dtype))
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        # Compiled by torch 2.11, an output of an operation in place, or of a `to` without effect, loses its gradient.
        y = exact * inverse_rms * weight
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse_rms = ctx.saved_tensors
        dy, w = grads[0].to(inverse_rms.dtype), weight.to(inverse_rms.dtype)
        n = x * inverse_rms
        p = dy * n
        projection = torch.mv(p.flatten(0, -2), w).div_(x.shape[-1]).view(inverse_rms.shape)
        dx = (dy * w).addcmul_(n, projection, value=-1).mul_(inverse_rms)
        return dx.to(x.dtype), p.flatten(0, -2).sum(0).to(weight.dtype), None


class Norm(CostedLayer):
    """[..., d] -> [..., d] in the dtype of x, with a weight [d]. A subclass computes `forward`.

    model.use_fp32_norm keeps the weight of a half-precision model in float32.
    """

    statistics = 1
    """Numbers per token that are saved for the backward pass, in the accumulation dtype."""

    def __init__(
        self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext, *, head_size: int | None = None
    ) -> None:
        """`head_size`: the number of features if those of single heads are normalised, which tp ranks split."""
        super().__init__()
        self.tp_ctx = tp_ctx
        self.eps = config.layer_norm_epsilon
        dtype = accumulation_dtype(tp_ctx.dtype) if config.use_fp32_norm else tp_ctx.dtype
        partial_over = tp_ctx.partial_over if head_size is None else ("tp",)
        layout = whole(f"{name}.weight", (head_size or config.hidden_size,), fill=1.0, partial_over=partial_over)
        self.weight = parameter(layout, dtype, tp_ctx.device)

    def saved_bytes(self, row: RowShape) -> Bytes:
        rows, wide = self.tp_ctx.rows(row.tokens), accumulation_dtype(self.tp_ctx.dtype)
        kept = self.weight.dtype if row.device == "cuda" else self.tp_ctx.dtype  # on CUDA x is cast before the kernel
        n_inputs = rows * self.weight.numel()
        return {"norm inputs": n_inputs * kept.itemsize, "norm statistics": self.statistics * rows * wide.itemsize}


class RMSNorm(Norm):
    """RMSNorm (see the module), as in Llama and InternLM."""

    def __init__(
        self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext, *, head_size: int | None = None
    ) -> None:
        super().__init__(name, config, tp_ctx, head_size=head_size)
        self.weight.manual_grad = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = accumulating(self.weight)
        if not x.is_cuda:
            return _RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x.to(weight.dtype), weight.shape, weight, self.eps).to(x.dtype)


NORMS: dict[str, type[Norm]] = {"rmsnorm": RMSNorm}
"""model.norm_type -> class."""


def build_norm(name: str, config: ModelConfig, tp_ctx: TensorParallelContext) -> Norm:
    """The norm of `config.norm_type`."""
    return NORMS[config.norm_type](name, config, tp_ctx)
