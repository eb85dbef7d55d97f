"""Token embedding, split over the tensor-parallel ranks along the hidden dimension or along the vocabulary.

split hidden:      each rank looks up its columns for every token; all-gather of columns
split vocabulary:  each rank looks up the tokens whose rows it holds, zero for the others; sum over ranks

With sequence parallelism each rank ends with all columns of its own tokens in either case.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype
from internlm_lite.layers.weight_grads import gradient_passes, report_grad
from internlm_lite.mesh.conjugate import columns_to_rows, gather_last
from internlm_lite.mesh.layout import Parameter, parameter, split


class _LookUp(torch.autograd.Function):
    """Adds the gradients of rows to `main_grad`: autograd would make a gradient of the whole vocabulary for them."""

    @staticmethod
    def forward(ctx: Any, weight: Parameter, tokens: torch.Tensor) -> torch.Tensor:
        ctx.weight = weight
        ctx.save_for_backward(tokens)
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (tokens,), grad = ctx.saved_tensors, ctx.weight.main_grad
        grad.index_add_(0, tokens, grads[0].to(grad.dtype))
        report_grad(ctx.weight)
        return None, None


def _look_up(weight: Parameter, tokens: torch.Tensor) -> torch.Tensor:
    """[T, width]: rows `tokens` [T] of `weight`."""
    return F.embedding(tokens, weight) if weight.main_grad is None else _LookUp.apply(weight, tokens)


class Embedding(CostedLayer):
    """tokens [T] int64 -> embeddings [T, hidden], or this rank's rows of them (layers/tensor_parallel.py).

    model.embed_grad_scale = a multiplies the gradient by a: e <- a*e + (1-a)*e.detach() (embedding gradient shrink:
    GLM-130B, arXiv:2210.02414, section 2.2). `partial_over`: see `ShardSpec.partial_over`.
    """

    def __init__(
        self, name: str, config: ModelConfig, tp_ctx: TensorParallelContext, partial_over: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        self.tp_ctx = tp_ctx
        self.split_hidden = not config.embedding_by_vocabulary
        self.grad_scale = config.embed_grad_scale
        shape, dim = (config.vocab_size, config.hidden_size), 1 if self.split_hidden else 0
        layout = split(f"{name}.weight", shape, dim, tp_ctx.group, init_std=config.init_std, partial_over=partial_over)
        self.weight = parameter(layout, tp_ctx.dtype, tp_ctx.device)
        self.weight.manual_grad = self.weight.deferred_grad = self.weight.looked_up = True

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        e = self._gathered(tokens) if self.split_hidden else self._summed(tokens)
        # lerp(e, e, a) = e + a*(e - e): exactly e, in every dtype.
        return e if self.grad_scale == 1 else torch.lerp(e.detach(), e, self.grad_scale)

    def _gathered(self, tokens: torch.Tensor) -> torch.Tensor:
        mine, group = _look_up(self.weight, tokens), self.tp_ctx.group
        return columns_to_rows(mine, group) if self.tp_ctx.by_sequence else gather_last(mine, group)

    def _summed(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.weight.shape[0]
        local = tokens - self.tp_ctx.group.rank * rows
        here = (local >= 0) & (local < rows)
        looked_up = _look_up(self.weight, local.clamp(0, rows - 1))
        return self.tp_ctx.leave(looked_up * here.unsqueeze(-1))

    def lookup_ops_per_token(self) -> int:
        """Cost of a lookup in the unit of `flops_per_token`, to balance pipeline stages: one per element copied."""
        return self.weight.shard_spec.shape[1]

    def saved_bytes(self, row: RowShape) -> Bytes:
        # Split vocabulary: each token's local row (int64) and whether it is on this rank (bool). Else the batch alone.
        return {"embedding": 0 if self.split_hidden else row.tokens * (8 + 1)}

    def passes(self, row: RowShape) -> list[Pass]:
        n_looked_up, item = row.tokens * self.weight.shape[1], self.weight.itemsize
        found = [Pass("contiguous_copy", 2 * item * n_looked_up)]
        if "gradients" in row.fused:  # rows are cast and added
            wide = accumulation_dtype(self.weight.dtype).itemsize
            found.append(Pass("contiguous_copy", (item + 4 * wide) * n_looked_up, 2, backward=True))
        else:  # a dense gradient: zeros, and the tokens' rows added
            dense = 3 * item * n_looked_up + self.weight.nbytes
            found += [Pass("contiguous_copy", dense, 8, backward=True), *gradient_passes(self.weight, row)]
        return [replace(one, part="embedding") for one in found]

    def messages(self, row: RowShape) -> list[Message]:
        tp_ctx, n_outputs = self.tp_ctx, row.tokens * self.weight.shard_spec.shape[1]
        if not self.split_hidden:
            return tp_ctx.sum_messages(n_outputs) + tp_ctx.gather_messages(n_outputs, backward=True)
        n_bytes = n_outputs * self.weight.itemsize
        if not tp_ctx.by_sequence:
            return [Message("tp", "all_gather", n_bytes)]
        return [Message("tp", "all_to_all", n_bytes // tp_ctx.group.size, backward=back) for back in (False, True)]
