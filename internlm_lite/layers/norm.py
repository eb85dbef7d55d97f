"""Normalisation of each token's features; `build_norm` chooses the model's norm.

    RMSNorm          y = x / sqrt(mean(x^2) + eps) * w                   (arXiv:1910.07467)
    LayerNorm        y = (x - mean(x)) / sqrt(var(x) + eps) * w + b      (arXiv:1607.06450)
    SampleLayerNorm  y = (x - mean(x)) / (std(x) + eps) * w + b          (harvardnlp/annotated-transformer)

std is the sample's deviation, of d - 1 degrees of freedom. With model.zero_centered_norm w is 1 + weight. Half
precision is computed in float32 and rounded once, at the end, as the norms of OLMo 2 and Gemma are; those of Llama and
Qwen in transformers round before they multiply by w, too.

On CUDA `F.rms_norm` is a fused kernel. On the CPU its backward pass is a chain of autograd nodes, so a hand-written
gradient is used there: forward plus backward 3.6 times as fast at [2048, 256] fp32. Of LayerNorm torch has fused
kernels on both.

    with n = x / rms, p = dy * n:   dw = sum_t p,   dx = (dy * w - n * (p . w) / d) / rms

`full_norms` does that over features which tensor-parallel ranks split: mean(x^2) and (p . w) / d are sums over them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Pass, RowShape
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype
from internlm_lite.layers.weight_grads import accumulating
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import ShardSpec, split, whole
from internlm_lite.mesh.mesh import Group


def _gain(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """weight + offset: a half-precision weight is added to in float32."""
    return weight.to(accumulation_dtype(weight.dtype)) + offset if offset else weight


class _RMSNorm(torch.autograd.Function):
    """x [..., d], weight [d] -> [..., d] in the dtype of x; half precision is computed in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offset: float, eps: float) -> torch.Tensor:
        exact = x.to(accumulation_dtype(x.dtype))
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)
        inverse_rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        ctx.offset = offset
        # Compiled by torch 2.11, an output of an operation in place, or of a `to` without effect, loses its gradient.
        y = exact * inverse_rms * _gain(weight, offset)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, inverse_rms = ctx.saved_tensors
        dy, w = grads[0].to(inverse_rms.dtype), _gain(weight, ctx.offset).to(inverse_rms.dtype)
        n = x * inverse_rms
        p = dy * n
        projection = torch.mv(p.flatten(0, -2), w).div_(x.shape[-1]).view(inverse_rms.shape)
        dx = (dy * w).addcmul_(n, projection, value=-1).mul_(inverse_rms)
        return dx.to(x.dtype), p.flatten(0, -2).sum(0).to(weight.dtype), None, None


class _LayerNorm(torch.autograd.Function):
    """torch's kernels; keeps x itself where they take it in the dtype of weights or statistics. `bias` may be None."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offset: float, eps: float
    ) -> torch.Tensor:
        exact, gain, shift = _LayerNorm._operands(x, weight, bias, offset)
        y, mean, inverse_std = torch.native_layer_norm(exact, gain.shape, gain, shift, eps)
        ctx.save_for_backward(x, weight, bias, mean, inverse_std)
        ctx.offset = offset
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, inverse_std = ctx.saved_tensors
        exact, gain, shift = _LayerNorm._operands(x, weight, bias, ctx.offset)
        exact = exact if x.is_cuda else exact.to(gain.dtype)  # on the CPU the kernel sums over tokens in the dtype of x
        dy, wanted = grads[0].to(exact.dtype).contiguous(), [True, True, bias is not None]
        statistics = gain.shape, mean, inverse_std
        dx, dw, db = torch.ops.aten.native_layer_norm_backward(dy, exact, *statistics, gain, shift, wanted)
        return dx.to(x.dtype), dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), None, None

    @staticmethod
    def _operands(
        x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offset: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the kernel takes: one dtype on CUDA. On the CPU it takes the statistics' dtype from the weight."""
        gain = _gain(weight, offset)
        gain = gain if x.is_cuda else gain.to(accumulation_dtype(x.dtype))
        return x.to(gain.dtype) if x.is_cuda else x, gain, None if bias is None else bias.to(gain.dtype)


class _SampleLayerNorm(torch.autograd.Function):
    """x [..., d], weight [d], bias [d] or None -> [..., d] in the dtype of x.

    With n = (x - mean) / (std + eps), g = dy * w:  dx = (g - mean(g)) / (std + eps) - n * (g . n) / ((d - 1) std)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, offset: float, eps: float
    ) -> torch.Tensor:
        exact = x.to(accumulation_dtype(x.dtype))
        std, mean = torch.std_mean(exact, dim=-1, keepdim=True)
        ctx.save_for_backward(x, weight, bias, mean, std)
        ctx.offset, ctx.eps = offset, eps
        y = (exact - mean) / (std + eps) * _gain(weight, offset)
        y = y if bias is None else y + bias
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, mean, std = ctx.saved_tensors
        dy, w = grads[0].to(std.dtype), _gain(weight, ctx.offset).to(std.dtype)
        n = (x - mean) / (std + ctx.eps)
        g = dy * w
        along = (g * n).sum(-1, keepdim=True) / ((x.shape[-1] - 1) * std.clamp_min(torch.finfo(std.dtype).tiny))
        dx = ((g - g.mean(-1, keepdim=True)) / (std + ctx.eps)).addcmul_(n, along, value=-1)
        dw, db = ((one.flatten(0, -2).sum(0)) for one in (dy * n, dy))
        return dx.to(x.dtype), dw.to(weight.dtype), None if bias is None else db.to(bias.dtype), None, None


class Norm(CostedLayer):
    """[..., d] -> [..., d] in the dtype of x, with a weight [d] and maybe a bias [d]. A subclass computes `forward`.

    model.use_fp32_norm keeps the parameters of a half-precision model in float32.
    """

    statistics = 1
    """Numbers per token that are saved for the backward pass, in the accumulation dtype."""
    adds_gradients = False
    """Whether `forward` takes its parameters by `accumulating`."""

    def __init__(
        self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext, *, heads: tuple[int, int] | None = None
    ) -> None:
        """`heads`: the number of heads, which tp ranks split, and their features; None: of the hidden state."""
        super().__init__()
        self.tp_ctx = tp_ctx
        self.eps = config.layer_norm_epsilon
        self.offset = 1.0 if config.zero_centered_norm else 0.0
        """Added to the weight."""
        self._own_heads = None if heads is None else heads[0] // tp_ctx.group.size
        dtype = accumulation_dtype(tp_ctx.dtype) if config.use_fp32_norm else tp_ctx.dtype
        weight, bias = self._layouts(name, config, heads)
        self.weight = tp_ctx.parameter(weight, dtype)
        self.bias = tp_ctx.parameter(bias, dtype) if config.has_norm_bias else None
        for param in (self.weight, self.bias):
            if param is not None:
                param.manual_grad = self.adds_gradients

    def _layouts(self, name: str, config: ModelConfig, heads: tuple[int, int] | None) -> tuple[ShardSpec, ShardSpec]:
        """Of the weight and of the bias."""
        shape = (config.hidden_size if heads is None else heads[1],)
        over = self.tp_ctx.partial_over if heads is None else ("tp",)
        weight = whole(f"{name}.weight", shape, fill=1 - self.offset, partial_over=over)
        return weight, whole(f"{name}.bias", shape, partial_over=over)

    def rows(self, row: RowShape) -> int:
        """How many vectors of this rank are normalised."""
        return self.tp_ctx.rows(row.tokens) if self._own_heads is None else row.tokens * self._own_heads

    def kept_dtype(self, device: str) -> torch.dtype:
        """In which the input is kept: on CUDA it is cast before the kernel."""
        gain = accumulation_dtype(self.weight.dtype) if self.offset else self.weight.dtype
        return gain if device == "cuda" else self.tp_ctx.dtype

    def saved_bytes(self, row: RowShape) -> Bytes:
        rows, wide = self.rows(row), accumulation_dtype(self.tp_ctx.dtype)
        inputs = rows * self.weight.numel() * self.kept_dtype(row.device).itemsize
        return {"norm inputs": inputs, "norm statistics": self.statistics * rows * wide.itemsize}

    def passes(self, row: RowShape) -> list[Pass]:
        """Backward: the input's gradient, then the weight's. A weight in fp32 casts input and output, both ways."""
        elements, fused = self.rows(row) * self.weight.numel(), "block" in row.fused
        x, kind = elements * self.tp_ctx.dtype.itemsize, "fused" if fused else "norm"
        kept = x if fused else elements * _gain(self.weight, self.offset).dtype.itemsize
        found = [Pass(kind, 2 * kept), Pass(kind, 5 * kept, 4, backward=True)]
        if row.selective and self._own_heads is None:
            found.append(Pass(kind, 2 * kept, backward=True, part="recomputation"))
        if kept != x:
            found += [Pass("cast", 2 * (x + kept), 2), Pass("cast", 2 * (x + kept), 2, backward=True)]
        return found


class RMSNorm(Norm):
    """RMSNorm (see the module), as in Llama and InternLM."""

    adds_gradients = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = accumulating(self.weight)
        if not x.is_cuda:
            y: torch.Tensor = _RMSNorm.apply(x, weight, self.offset, self.eps)
            return y
        gain = _gain(weight, self.offset)
        return F.rms_norm(x.to(gain.dtype), gain.shape, gain, self.eps).to(x.dtype)


class LayerNorm(Norm):
    """LayerNorm (see the module), as in GPT-2."""

    statistics = 2
    adds_gradients = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else accumulating(self.bias)
        y: torch.Tensor = _LayerNorm.apply(x, accumulating(self.weight), bias, self.offset, self.eps)
        return y

    def kept_dtype(self, device: str) -> torch.dtype:
        return self.tp_ctx.dtype


class SampleLayerNorm(LayerNorm):
    """SampleLayerNorm (see the module), as in the annotated transformer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else accumulating(self.bias)
        y: torch.Tensor = _SampleLayerNorm.apply(x, accumulating(self.weight), bias, self.offset, self.eps)
        return y

    def passes(self, row: RowShape) -> list[Pass]:
        """Unless compiled, single operations: deviation and mean; difference, quotient, product and sum."""
        if "block" in row.fused:
            return super().passes(row)
        x = self.rows(row) * self.weight.numel() * accumulation_dtype(self.tp_ctx.dtype).itemsize
        casts = 2 if self.tp_ctx.dtype.itemsize == 2 else 0
        forward, backward = (
            Pass("elementwise", 9 * x, 5 + casts),
            Pass("elementwise", 27 * x, 14 + casts, backward=True),
        )
        again = replace(forward, backward=True, part="recomputation")
        return [forward, backward, *[again] * (row.selective and self._own_heads is None)]


class FullRMSNorm(RMSNorm):
    """A weight for the features of all heads, in the order of the heads (that of transformers); tensor-parallel ranks
    have those of their own heads. The function `full_norms` applies it."""

    def _layouts(self, name: str, config: ModelConfig, heads: tuple[int, int] | None) -> tuple[ShardSpec, ShardSpec]:
        assert heads is not None, "the features of single heads have one norm"
        shape, group = (math.prod(heads),), self.tp_ctx.group
        weight = replace(split(f"{name}.weight", shape, 0, group), fill=1 - self.offset)
        return weight, split(f"{name}.bias", shape, 0, group)

    def rows(self, row: RowShape) -> int:
        return row.tokens

    def kept_dtype(self, device: str) -> torch.dtype:
        return self.tp_ctx.dtype

    def passes(self, row: RowShape) -> list[Pass]:
        """Single operations: a collective lies between them."""
        x = row.tokens * self.weight.numel() * self.tp_ctx.dtype.itemsize
        if "block" in row.fused:
            return [Pass("fused", 2 * x, 2), Pass("fused", 5 * x, 4, backward=True)]
        half = self.tp_ctx.dtype.itemsize == 2
        forward = Pass("elementwise", (11 if half else 5) * x, 8 if half else 7)
        return [forward, Pass("elementwise", (28 if half else 14) * x, 11 if half else 8, backward=True)]


def full_norms(xs: Sequence[torch.Tensor], norms: Sequence[FullRMSNorm]) -> tuple[torch.Tensor, ...]:
    """Each x [T, ...] by its norm, over all features of a token on all tensor-parallel ranks. Collective: one
    all-reduce for all, and one in the backward pass."""
    tensors = [one for x, norm in zip(xs, norms, strict=True) for one in (x, accumulating(norm.weight))]
    ys: tuple[torch.Tensor, ...] = _FullRMSNorm.apply(norms[0].tp_ctx.group, norms[0].offset, norms[0].eps, *tensors)
    return ys


class _FullRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, offset: float, eps: float, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        xs, weights = tensors[::2], tensors[1::2]
        wide = accumulation_dtype(xs[0].dtype)
        squares = [torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=wide).square() for x in xs]
        inverse_rms = (_means(squares, xs, group) + eps).rsqrt()  # [number of xs, T]
        ctx.save_for_backward(inverse_rms, *tensors)
        ctx.group, ctx.offset = group, offset
        ys = [
            _by_token(r, x) * x * _gain(w, offset).view(x.shape[1:])
            for x, w, r in zip(xs, weights, inverse_rms, strict=True)
        ]
        return tuple(y if y.dtype == x.dtype else y.to(x.dtype) for x, y in zip(xs, ys, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inverse_rms, *tensors = ctx.saved_tensors
        xs, weights = tensors[::2], tensors[1::2]
        gains = [_gain(w, ctx.offset).to(inverse_rms.dtype) for w in weights]
        ns = [_by_token(r, x) * x for x, r in zip(xs, inverse_rms, strict=True)]
        ps = [(dy * n).flatten(1) for dy, n in zip(grads, ns, strict=True)]
        projections = _means([torch.mv(p, w) for p, w in zip(ps, gains, strict=True)], xs, ctx.group)
        made = []
        for i, (x, n, dy, w) in enumerate(zip(xs, ns, grads, gains, strict=True)):
            dx = (dy * w.view(x.shape[1:])).addcmul_(n, _by_token(projections[i], x), value=-1)
            made += [dx.mul_(_by_token(inverse_rms[i], x)).to(x.dtype), ps[i].sum(0).to(weights[i].dtype)]
        return None, None, None, *made


def _means(sums: Sequence[torch.Tensor], xs: Sequence[torch.Tensor], group: Group) -> torch.Tensor:
    """[number of xs, T]: means over the features of each token of x, from the sums [T] over this rank's. Collective."""
    parts = [one / (x[0].numel() * group.size) for one, x in zip(sums, xs, strict=True)]
    means = torch.stack(parts)
    comm.all_reduce(means, group).wait()
    return means


def _by_token(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[T] -> [T, 1, ...], as many dimensions as x."""
    return values.view(-1, *[1] * (x.dim() - 1))


NORMS: dict[str, type[Norm]] = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "sample_layernorm": SampleLayerNorm}
"""model.norm_type -> class."""


def build_norm(name: str, config: ModelConfig, tp_ctx: TensorParallelContext) -> Norm:
    """The norm of `config.norm_type` for the hidden state."""
    return NORMS[config.norm_type](name, config, tp_ctx)
