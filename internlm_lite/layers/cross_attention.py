"""Attention of a decoder's tokens to their source: queries of the hidden state, keys and values of the memory, which is
the encoder's last hidden state. Neither is rotated. Keys and values have one fused projection, whose rows are

    wkv:  [ k v | k v | ... ]      one block per key/value head

so a tensor-parallel rank holds one contiguous range of rows, as of `wqkv` (layers/attention.py). The caller chooses the
kernel and the borders of documents with `attend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.layers.context_parallel.exchange_costs import kept_outputs
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape, add_bytes
from internlm_lite.layers.flash import Attend
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns, output_std
from internlm_lite.layers.norm import NORMS, FullRMSNorm, Norm, full_norms
from internlm_lite.layers.recompute import Recipe
from internlm_lite.layers.scores import across_rule
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype


@dataclass(frozen=True)
class Memory:
    """What a decoder reads of its source."""

    hidden: torch.Tensor
    """[S, hidden] outside split layers: the encoder's last hidden state; S = 0 where `attend` knows keys and values."""
    attend: Attend
    """Of queries of the target row to keys of the source row."""


class CrossAttention(CostedLayer):
    """x [T, hidden], memory [S, hidden] -> as x, all outside split layers (layers/tensor_parallel.py)."""

    def __init__(self, name: str, layer: int, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        hidden_size, heads, kv_heads, size = (
            config.hidden_size,
            config.num_attention_heads,
            config.kv_heads,
            config.head_size,
        )
        self.tp_ctx, self.head_dim = tp_ctx, size
        self.rule = across_rule(config, layer)
        self.has_dropout = config.attention_dropout > 0
        std, bias = config.hidden_std, config.has_qkv_bias
        self.wq = ColumnLinear(f"{name}.wq", hidden_size, heads * size, tp_ctx, init_std=std, bias=bias)
        self.wkv = ColumnLinear(f"{name}.wkv", hidden_size, 2 * kv_heads * size, tp_ctx, init_std=std, bias=bias)
        self.wkv.weight.matrix_rows = (size, size)
        std, bias = output_std(config), config.has_out_bias
        self.wo = RowLinear(f"{name}.wo", heads * size, hidden_size, tp_ctx, init_std=std, bias=bias)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if config.qk_norm:
            norm = FullRMSNorm if config.qk_norm == "full" else NORMS[config.norm_type]
            self.q_norm = norm(f"{name}.q_norm", config, tp_ctx, heads=(heads, size))
            self.k_norm = norm(f"{name}.k_norm", config, tp_ctx, heads=(kv_heads, size))

    def forward(self, x: torch.Tensor, memory: Memory) -> torch.Tensor:
        return self.output(memory.attend(self.rule, self.queries(x), *self.keys_values(memory.hidden)))

    def queries(self, x: torch.Tensor, recipe: Recipe | None = None) -> torch.Tensor:
        """[T, heads, head_dim] of this rank. `recipe`: of x, as in `columns`."""
        (q,) = columns(x, self.wq, recipe=recipe)
        return _normed(q.unflatten(1, (-1, self.head_dim)), self.q_norm)

    def keys_values(self, memory: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [S, kv_heads, head_dim] of this rank."""
        if not len(memory):  # the caller of a decoder alone has them already; no kernel is asked for nothing
            rows = self.wkv.weight.shape[0] // self.head_dim // 2
            return (none := memory.new_empty(0, rows, self.head_dim)), none
        (kv,) = columns(memory, self.wkv)
        k, v = kv.view(kv.shape[0], -1, 2, self.head_dim).unbind(2)
        return _normed(k, self.k_norm), v

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """What `attend` returned, [T, heads, head_dim] -> outside."""
        y: torch.Tensor = self.wo(mixed.flatten(1))
        return y

    def flops_per_token(self, seq_len: int) -> int:
        """Of a target token and of the source tokens that a row has for each."""
        share = self.tp_ctx.source_share
        pairs = 4 * int(seq_len * share) * self.wo.weight.shard_spec.shape[1]  # q k^T, and its softmax times v
        of_target = self.wq.flops_per_token(seq_len) + self.wo.flops_per_token(seq_len)
        return of_target + int(self.wkv.flops_per_token(seq_len) * share) + pairs

    def saved_bytes(self, row: RowShape) -> Bytes:
        """Without the memory, which all layers of a decoder share."""
        source, output = row.of_source, self.wo.saved_bytes(row)["projection inputs"]
        item, heads = self.wq.weight.itemsize, self.wq.weight.shape[0] // self.head_dim
        in_blocks = row.reference and (self.rule.softcap is not None or self.has_dropout)
        statistics = heads * accumulation_dtype(self.wq.weight.dtype).itemsize
        normed = self.q_norm is not None
        projected = row.tokens * self.wq.weight.shape[0] + source.tokens * self.wkv.weight.shape[0]
        of_norms = row.tokens * self.wq.weight.shape[0] + source.tokens * self.wkv.weight.shape[0] // 2
        kept = {
            "queries, keys, values": (projected + normed * of_norms) * item,
            "attention output": output * kept_outputs(row, in_blocks=in_blocks),
            "attention statistics": row.tokens * statistics * (not in_blocks),
        }
        norms = [self._norm_bytes(self.q_norm, row), self._norm_bytes(self.k_norm, source)]
        return add_bytes(self.wq.saved_bytes(row), kept, *norms)

    def _norm_bytes(self, norm: Norm | None, row: RowShape) -> Bytes:
        """Without the input where it is kept in its dtype: then it is a view of a projection's output."""
        found = {} if norm is None else norm.saved_bytes(row)
        if norm is not None and norm.kept_dtype(row.device) == self.tp_ctx.dtype:
            del found["norm inputs"]
        return found

    def messages(self, row: RowShape) -> list[Message]:
        found = [*self.wq.messages(row), *self.wkv.messages(row.of_source), *self.wo.messages(row)]
        if isinstance(self.q_norm, FullRMSNorm):  # a sum of each token's features
            for tokens in (row.tokens, row.of_source.tokens):
                n_bytes = tokens * accumulation_dtype(self.tp_ctx.dtype).itemsize
                group = self.tp_ctx.group.name
                found += [Message(group, "all_reduce", n_bytes, backward=back) for back in (False, True)]
        return found

    def passes(self, row: RowShape) -> list[Pass]:
        """Attention itself, and the gradients of keys and values joined to one tensor."""
        source = row.of_source
        joined = source.tokens * self.wkv.weight.shape[0] * self.wkv.weight.itemsize
        found = [Pass("attention", 0), Pass("attention", 0, 5, backward=True)]
        found.append(Pass("contiguous_copy", 2 * joined, backward=True))
        for part, of in ((self.wq, row), (self.wkv, source), (self.wo, row), (self.q_norm, row), (self.k_norm, source)):
            found += [] if part is None else part.passes(of)
        return found

    def deferred_bytes(self, row: RowShape) -> int:
        of_target = self.wq.deferred_bytes(row) + self.wo.deferred_bytes(row)
        return of_target + self.wkv.deferred_bytes(row.of_source)


def _normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    if norm is None:
        return x
    y: torch.Tensor = full_norms((x,), (norm,))[0] if isinstance(norm, FullRMSNorm) else norm(x)
    return y
