"""Fused output projection and cross-entropy: logits exist for one chunk of tokens at a time, never as a whole [T, V].

    z = h W^T + b              loss = log sum_v exp z_v - (1 - s) z_label - s/V sum_v z_v
    dh = dz W, dW = dz^T h     dz   = softmax(z) - (1 - s) [v = label] - s/V

(s: label smoothing, V: vocabulary size.) With a pad id p, which no label is, the target is t = 1 - s of the label, 0 of
p and s / (V - 2) of each other id, as in the annotated transformer, and the loss its divergence KL(t | softmax z):

    loss = log sum_v exp z_v - sum_v t_v z_v + sum_v t_v log t_v          dz = softmax(z) - t

A model may scale and cap its logits, and a run add a z-loss:

    z <- a z, then c tanh(z / c)       dz <- a (1 - (z / c)^2) dz
    loss <- loss + k lse^2             dz <- dz + 2 k lse softmax(z)         lse = log sum_v exp z_v

When gradients are needed, the forward pass overwrites a chunk's logits by dz and adds it to dh and dW, so the backward
pass recomputes nothing. W may be split by rows (vocabulary) over the tensor-parallel ranks: the maximum, the sum of
exponentials and the label's logit are all-reduced over them; each rank's dh is a partial sum, so the caller must pass h
through `TensorParallelContext.enter`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from internlm_lite.batch import IGNORE
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.layers.weight_grads import add_product, grad_buffer, report_grad
from internlm_lite.mesh.comm import all_reduce
from internlm_lite.mesh.conjugate import gather_last
from internlm_lite.mesh.mesh import Group

_CHUNK_BYTES = {"cpu": 24 << 20, "cuda": 512 << 20}
"""Bytes of one chunk's logits: small enough for a CPU's cache, large enough for efficient matrix products on a GPU."""


class TokenLosses(NamedTuple):
    """Losses of a row of T tokens. Only `scaled_sum` is differentiable. A tuple, because DeepSpeed's stage 3 looks for
    the tensors that a module returns in tuples, lists and dicts alone."""

    scaled_sum: torch.Tensor
    """Scalar to differentiate: `scale` times the sum over tokens of the loss with label smoothing and z-loss."""
    train_loss_sum: torch.Tensor
    """Scalar: the sum over tokens of the loss with label smoothing, without z-loss: that is no error of the model."""
    token_loss: torch.Tensor
    """[T] cross-entropy without smoothing, 0 where the label is IGNORE; float32, or float64 for a float64 model."""
    correct: torch.Tensor
    """[T] bool: the label's logit is the maximum; False where the label is IGNORE."""


@dataclass(frozen=True)
class LossOptions:
    """Arguments that are the same for every call."""

    group: Group
    """The ranks over which the vocabulary is split."""
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float | None = None
    logit_softcap: float | None = None
    parallel_output: bool = True
    """False: all-gather the logits; then every rank computes the whole loss."""
    fused: Callable[..., tuple[torch.Tensor, ...]] | None = None
    """`losses_and_gradient`, compiled; used where gradients are needed. For a group of one rank."""
    pad_id: int | None = None
    """What smoothed targets leave out."""

    def smoothed(self, vocab_size: int) -> tuple[float, float, float]:
        """Of a smoothed target: (weight of the label's logit beside that of every id, weight of every id, entropy that
        the loss leaves out)."""
        s = self.label_smoothing
        if self.pad_id is None:
            return 1 - s, s / vocab_size, 0.0
        of_each = s / (vocab_size - 2)
        return 1 - s - of_each, of_each, -(1 - s) * math.log(1 - s) - (s * math.log(of_each) if s else 0)


@dataclass(frozen=True)
class _Terms:
    """Arguments that are the same for all chunks of one call."""

    scale: torch.Tensor
    vocab_size: int
    options: LossOptions
    needs_grad: bool


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    scale: torch.Tensor,
    options: LossOptions,
    bias: torch.Tensor | None = None,
) -> TokenLosses:
    """hidden [T, d], weight [V / group size, d] and bias [V / group size] of the same dtype, labels [T] int64 or
    IGNORE, scale: scalar tensor.

    `scale` multiplies the gradient before it is rounded to half precision. A second backward pass raises RuntimeError.
    The forward pass adds dW to `weight.main_grad`, if there is one: then the gradient of `scaled_sum` must be 1.
    Collective over `options.group`."""
    scale = scale.to(accumulation_dtype(hidden.dtype))
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    terms = _Terms(scale, weight.shape[0] * options.group.size, options, needs_grad)
    return TokenLosses(*_LinearCrossEntropy.apply(hidden, weight, bias, labels, terms))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        terms: _Terms,
    ) -> tuple[torch.Tensor, ...]:
        wide = accumulation_dtype(hidden.dtype)
        chunk = tokens_per_chunk(hidden.shape[0], weight.shape[0], wide.itemsize, hidden.device.type)
        gradients = _Gradients(hidden, weight, bias, chunk) if terms.needs_grad else None
        fused = terms.options.fused if terms.needs_grad else None
        buffer = hidden.new_empty(0 if fused else chunk, weight.shape[0], dtype=wide)
        losses = []
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            if fused is not None:
                *found, logits = fused(hidden[rows] @ weight.t(), bias, labels[rows], terms)
            else:
                logits = _project(hidden[rows], weight, out=buffer[: rows.stop - start])
                found = [*_chunk_losses(logits, bias, labels[rows], terms)]
            losses.append(found)
            if gradients is not None:
                gradients.add(rows, logits)
        ctx.gradients, ctx.weight = None if gradients is None else gradients.finish(), weight
        token_loss, train_loss, correct, *z_loss = (torch.cat(parts) for parts in zip(*losses, strict=True))
        train_loss_sum = train_loss.sum()
        whole_sum = sum((part.sum() for part in z_loss), train_loss_sum)
        ctx.mark_non_differentiable(train_loss_sum, token_loss, correct)
        ctx.set_materialize_grads(False)
        return whole_sum * terms.scale, train_loss_sum, token_loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy: its gradient was taken already; call it again to take it again")
        gradients, ctx.gradients = ctx.gradients, None
        dhidden, dbias, dweight = (None if gradient is None else gradient.mul_(grads[0]) for gradient in gradients)
        if dweight is not None:
            return dhidden, dweight, dbias, None, None
        if grads[0].device.type == "cpu" and grads[0] != 1:  # on CUDA the host would wait
            raise RuntimeError("linear_cross_entropy: multiply `scale`, not the loss: dW was added in the forward pass")
        report_grad(ctx.weight)
        return dhidden, None, dbias, None, None


def tokens_per_chunk(tokens: int, vocab: int, itemsize: int, device_type: str) -> int:
    """Tokens per chunk, given `vocab` logits of `itemsize` bytes per token; only the last chunk may be shorter."""
    limit = max(1, _CHUNK_BYTES.get(device_type, _CHUNK_BYTES["cpu"]) // (vocab * itemsize))
    n_tokens = max(1, tokens)
    n_chunks = -(-n_tokens // limit)
    return -(-n_tokens // n_chunks)


def _project(hidden: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    return out.copy_(hidden @ weight.t())


def final_logits(logits: torch.Tensor, bias: torch.Tensor | None, options: LossOptions) -> torch.Tensor:
    """z of h W^T [c, V / group size], in its place."""
    if bias is not None:
        logits.add_(bias)
    if options.logit_scale is not None:
        logits.mul_(options.logit_scale)
    if (cap := options.logit_softcap) is not None:
        logits.div_(cap).tanh_()
        return logits * cap if logits.requires_grad else logits.mul_(cap)  # autograd keeps the tanh
    return logits


def _slope(logits: torch.Tensor, options: LossOptions) -> torch.Tensor | float | None:
    """The derivative of `final_logits` where that returned `logits`; None: 1."""
    scale, cap = options.logit_scale, options.logit_softcap
    if cap is None:
        return scale
    scale = 1.0 if scale is None else scale
    return (logits / cap).square_().mul_(-scale).add_(scale)


def _chunk_losses(
    logits: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, terms: _Terms
) -> tuple[torch.Tensor, ...]:
    """(token loss, training loss, correct) and z-loss, if there is one, each [c]. Overwrites h W^T [c, V / group size]
    by its gradient or scratch values."""
    options, mine = terms.options, final_logits(logits, bias, terms.options)
    slope = _slope(mine, options) if terms.needs_grad else None
    group, smoothing = options.group, options.label_smoothing
    of_label, of_each, entropy = options.smoothed(terms.vocab_size)
    if not options.parallel_output:
        logits, group = gather_last(logits, group), Group(group.name, (group.ranks[group.rank],), 0, None)
    local = labels - group.rank * logits.shape[1]
    here = (local >= 0) & (local < logits.shape[1])
    column = local.clamp(0, logits.shape[1] - 1).unsqueeze(1)

    peak = logits.amax(dim=1)
    all_reduce(peak, group, dist.ReduceOp.MAX).wait()
    target = torch.where(here, logits.gather(1, column).squeeze(1), 0)
    total = logits.sum(dim=1) if smoothing else torch.zeros_like(target)
    pad = None if options.pad_id is None or not smoothing else options.pad_id - group.rank * logits.shape[1]
    if pad is not None and 0 <= pad < logits.shape[1]:
        total = total - logits[:, pad]
    else:
        pad = None  # its column is on another rank
    exponentials = logits.sub_(peak.unsqueeze(1)).exp_()
    sums = torch.stack((exponentials.sum(dim=1), target, total))
    all_reduce(sums, group).wait()
    sum_exp, target, total = sums

    keep = labels != IGNORE
    log_z = peak + sum_exp.log()
    token_loss = torch.where(keep, log_z - target, 0)
    smoothed = log_z - of_label * target - of_each * total
    train_loss = torch.where(keep, smoothed - entropy if entropy else smoothed, 0)
    z_loss = [torch.where(keep, options.z_loss * log_z.square(), 0)] if options.z_loss else []
    if terms.needs_grad:
        scale = keep * terms.scale
        of_softmax = scale * (1 + 2 * options.z_loss * log_z) if options.z_loss else scale
        exponentials.mul_((of_softmax / sum_exp).unsqueeze(1))
        label_grad = (-of_label * scale * here).unsqueeze(1)
        if torch.compiler.is_compiling():  # a scatter would write all logits to memory before it, and read them again
            exponentials.add_(torch.where(torch.arange(logits.shape[1], device=logits.device) == column, label_grad, 0))
        else:
            exponentials.scatter_add_(1, column, label_grad)
        if smoothing:
            exponentials.sub_((scale * of_each).unsqueeze(1))
        if pad is not None:
            exponentials[:, pad] += scale * of_each
        if not options.parallel_output:
            mine.copy_(exponentials.chunk(options.group.size, dim=1)[options.group.rank])
        if slope is not None:
            mine.mul_(slope)
    return token_loss, train_loss, keep & (target >= peak), *z_loss


def losses_and_gradient(
    logits: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor, terms: _Terms
) -> tuple[torch.Tensor, ...]:
    """`_chunk_losses` of h W^T in any dtype, which stays, and its gradient in its dtype. To be compiled: then bf16
    logits are read twice and dz is written once, 6 bytes a logit, where the single operations move 50."""
    scratch = logits.to(accumulation_dtype(logits.dtype), copy=True)
    return (*_chunk_losses(scratch, bias, labels, terms), scratch.to(logits.dtype))


class _Gradients:
    """Accumulates dh and dW over chunks, dW in `main_grad`, if there is one. Several chunks of a half-precision weight
    are summed in float32, if need be before they are added to `main_grad`."""

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, chunk: int) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.dhidden = torch.empty_like(hidden)
        self.dbias = None if bias is None else torch.zeros_like(bias, dtype=accumulation_dtype(bias.dtype))
        has_buffer = getattr(weight, "main_grad", None) is not None
        self.main_grad = grad_buffer(weight) if has_buffer else None
        several, wide = chunk < hidden.shape[0], accumulation_dtype(weight.dtype)
        if self.main_grad is not None and not (several and self.main_grad.dtype != wide):
            self.dweight = self.main_grad
        else:
            self.dweight = torch.zeros_like(weight, dtype=wide if several else weight.dtype)

    def add(self, rows: slice, dlogits: torch.Tensor) -> None:
        """dlogits [c, V / group size] of the tokens `rows`."""
        if self.dbias is not None:
            self.dbias += dlogits.sum(0, dtype=self.dbias.dtype)
        dlogits = dlogits.to(self.hidden.dtype)
        torch.mm(dlogits, self.weight, out=self.dhidden[rows])
        if self.dweight.dtype == dlogits.dtype:
            self.dweight.addmm_(dlogits.t(), self.hidden[rows])
        else:
            add_product(self.dweight, dlogits, self.hidden[rows])

    def finish(self) -> tuple[torch.Tensor | None, ...]:
        """(dh, db, dW) in the dtypes of h, b and W; None for dW if it is in `main_grad`."""
        dbias = None if self.bias is None or self.dbias is None else self.dbias.to(self.bias.dtype)
        if self.main_grad is None:
            return self.dhidden, dbias, self.dweight.to(self.weight.dtype)
        if self.dweight is not self.main_grad:
            self.main_grad.add_(self.dweight)
        return self.dhidden, dbias, None
