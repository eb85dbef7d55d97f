"""The output projection to the vocabulary, fused with the loss. Its weight may be tied to the embedding's."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import LossConfig, ModelConfig
from internlm_lite.layers.compiled import compiled
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.loss import (
    LossOptions,
    TokenLosses,
    final_logits,
    linear_cross_entropy,
    losses_and_gradient,
    tokens_per_chunk,
)
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype
from internlm_lite.layers.weight_grads import accumulating, gradient_passes
from internlm_lite.mesh.conjugate import gather_last
from internlm_lite.mesh.layout import Parameter, split


class Head(CostedLayer):
    """Weight [vocab / group size, hidden] and bias [vocab / group size]: the vocabulary is split over the group.

    `tied`: the embedding's weight, if this rank has it. Otherwise a tied head holds a copy, partial over `tied_over`.
    """

    weights_in_backward = False  # the forward pass computes all gradients

    def __init__(
        self,
        config: ModelConfig,
        loss: LossConfig,
        tp_ctx: TensorParallelContext,
        tied: Parameter | None = None,
        tied_over: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        fused = compiled(losses_and_gradient) if tp_ctx.compiled and tp_ctx.group.size == 1 else None
        self.loss_options = LossOptions(
            tp_ctx.group,
            loss.label_smoothing,
            loss.z_loss,
            config.logit_scale,
            config.logit_softcap,
            config.parallel_output,
            fused,
            loss.pad_id,
        )
        self.borrowed = () if tied is None else (tied,)
        """Parameters that another unit registers: a tied weight, which the tuple hides from nn.Module here."""
        if tied is None:
            shape = (config.vocab_size, config.hidden_size)
            name = "tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"
            layout = split(name, shape, 0, tp_ctx.group, init_std=config.init_std, partial_over=tied_over)
            self.weight = tp_ctx.parameter(layout)
            self.weight.manual_grad = self.weight.deferred_grad = True
            self.weight.looked_up = config.tie_word_embeddings
        else:
            tied.grads_per_microbatch += 1
        self.bias: Parameter | None = None
        if config.head_bias:
            layout = split("output.bias", (config.vocab_size,), 0, tp_ctx.group)
            self.bias = tp_ctx.parameter(layout)
            self.bias.manual_grad = True

    @property
    def matrix(self) -> Parameter:
        """The weight [vocab / group size, hidden]: this head's own, or the embedding's."""
        return self.borrowed[0] if self.borrowed else self.weight

    def forward(
        self, hidden: torch.Tensor, labels: torch.Tensor | None = None, scale: torch.Tensor | None = None
    ) -> TokenLosses | torch.Tensor:
        """hidden outside -> logits [T, vocab], gathered over tp; with labels [T] and scale: TokenLosses. Collective."""
        hidden = self.tp_ctx.enter(hidden)
        if labels is None or scale is None:
            return gather_last(self._logits(hidden), self.tp_ctx.group)
        bias = None if self.bias is None else accumulating(self.bias)
        return linear_cross_entropy(hidden, self.matrix, labels, scale, self.loss_options, bias)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of this rank's part of the vocabulary; bias, scale and cap in the dtype of sums, as in the loss."""
        logits, options = F.linear(hidden, self.matrix), self.loss_options
        if self.bias is None and options.logit_scale is None and options.logit_softcap is None:
            return logits
        wide = logits.to(accumulation_dtype(logits.dtype))
        return final_logits(wide, self.bias, options).to(logits.dtype)

    def flops_per_token(self, seq_len: int) -> int:
        return 2 * math.prod(self.matrix.shard_spec.shape)

    def saved_bytes(self, row: RowShape) -> Bytes:
        # The gradients of its input and of its bias, which the forward pass computes.
        n_bias = 0 if self.bias is None else self.bias.numel()
        return {"head": (row.tokens * self.matrix.shape[1] + n_bias) * self.matrix.itemsize}

    def messages(self, row: RowShape) -> list[Message]:
        n_inputs, wide = row.tokens * self.matrix.shape[1], accumulation_dtype(self.matrix.dtype).itemsize
        found = self.tp_ctx.gather_messages(n_inputs) + self.tp_ctx.sum_messages(n_inputs, backward=True)
        chunk = self._chunk(row)
        for tokens, times in ((chunk, row.tokens // chunk), (row.tokens % chunk, int(row.tokens % chunk > 0))):
            if self.loss_options.parallel_output:
                # Per token: the maximum, then three sums over the vocabulary (loss.py).
                found += [Message("tp", "all_reduce", n * tokens * wide, times) for n in (1, 3)]
            else:
                found.append(Message("tp", "all_gather", tokens * self.matrix.shard_spec.shape[0] * wide, times))
        return found

    def passes(self, row: RowShape) -> list[Pass]:
        """Forward, chunk by chunk: the loss and its gradient over the logits, and the weight's gradient, added to the
        optimizer's buffer or to a sum, which the backward pass scales and adds; it scales the input's gradient."""
        (vocab, width), item = self.matrix.shape, self.matrix.itemsize
        wide, half = accumulation_dtype(self.matrix.dtype).itemsize, self.matrix.dtype.itemsize == 2
        logits, chunks = row.tokens * vocab, -(-row.tokens // self._chunk(row))
        found = [Pass("product", 0, 3 * chunks)]
        if self.bias is not None:  # the sum of its gradient over the tokens; unless fused, its addition
            found.append(Pass("reduce", (item if "loss" in row.fused else wide) * logits, 2 * chunks))
        if "loss" in row.fused:
            found.append(Pass("fused", 3 * item * logits, 2 * chunks))
        else:  # peak; minus peak; exp; sum; times scale; and the casts to and from fp32
            found += [Pass("reduce", 2 * wide * logits, 2 * chunks), Pass("broadcast", 4 * wide * logits, 30 * chunks)]
            found.append(Pass("elementwise", 2 * wide * logits, chunks))
            found.append(Pass("elementwise", self._transform_passes() * wide * logits, 7 * chunks))
            found += [Pass(kind, (item + wide) * logits, chunks) for kind in ("cast", "contiguous_copy") if half]
        results = [self.tp_ctx.hidden_bytes(row.tokens, width)]
        if "gradients" in row.fused:
            found.append(Pass("accumulate", chunks * 2 * wide * vocab * width, 0))
        else:
            found += self._summed_gradient(chunks)
            results.append(self.matrix.nbytes)
            found += gradient_passes(self.matrix, row)
        found += [Pass("broadcast", 2 * size, backward=True) for size in results]
        return [replace(one, part="loss") for one in found]

    def _transform_passes(self) -> int:
        """How often bias, scale, cap and their derivatives read or write logits that no compiler fuses."""
        scaled, capped = self.loss_options.logit_scale is not None, self.loss_options.logit_softcap is not None
        derivative = 8 + 3 if capped else 2 * scaled  # /, square, *, +; times dz
        return 2 * (self.bias is not None) + 2 * scaled + 6 * capped + derivative

    def _summed_gradient(self, chunks: int) -> list[Pass]:
        """The sum over chunks of the weight's gradient, of its own."""
        if chunks == 1:
            return []
        n, item, wide = self.matrix.numel(), self.matrix.itemsize, accumulation_dtype(self.matrix.dtype).itemsize
        added = Pass("accumulate", chunks * 2 * wide * n, 0)
        if item < wide:
            added = Pass("broadcast", chunks * (2 * wide + item) * n, chunks)
        return [Pass("contiguous_copy", wide * n), added, Pass("contiguous_copy", (item + wide) * n)]

    def workspace_bytes(self, row: RowShape) -> int:
        """Logits of one chunk, and beside them the derivative of their cap; or, before or after it, a half-precision
        copy for the matrix products, and on the CPU the product that is added to a buffer of another dtype."""
        (vocab, width), dtype = self.matrix.shape, self.matrix.dtype
        chunk, wide = self._chunk(row), accumulation_dtype(dtype).itemsize
        half = dtype.itemsize < wide
        gathers = self.tp_ctx.group.size > 1 and not self.loss_options.parallel_output
        gathered = gathers * chunk * self.matrix.shard_spec.shape[0] * wide
        slope = (self.loss_options.logit_softcap is not None) * chunk * vocab * wide
        rounded = half * (chunk + (row.device != "cuda") * width) * vocab * dtype.itemsize
        return chunk * vocab * wide + gathered + max(slope, rounded)

    def _chunk(self, row: RowShape) -> int:
        wide = accumulation_dtype(self.matrix.dtype)
        return tokens_per_chunk(row.tokens, self.matrix.shape[0], wide.itemsize, row.device)
