"""Grouped-query attention (arXiv:2305.13245) with one fused projection, whose rows are ordered as in InternLM2:

    wqkv:  [ q0 .. q(g-1) k v | q0 .. q(g-1) k v | ... ]      one block per key/value head, g query heads each

so a tensor-parallel rank, which holds whole blocks, holds one contiguous range of rows. Queries alone are in the order
of the heads, as in transformers; so is the weight of their norm with model.qk_norm="full", and that of the keys'.
The caller chooses the kernel and the mask with `attend`: packed attention in training, the KV cache in generation.
"""

from __future__ import annotations

from functools import partial

import torch

from internlm_lite.config.schema import ModelConfig
from internlm_lite.errors import ConfigError
from internlm_lite.layers.compiled import compiled_in_training
from internlm_lite.layers.context_parallel.exchange_costs import (
    HeadBytes,
    exchange_messages,
    in_ring,
    kept_keys,
    kept_outputs,
)
from internlm_lite.layers.costs import Bytes, CostedLayer, Message, Pass, RowShape, add_bytes
from internlm_lite.layers.flash import Attend
from internlm_lite.layers.linear import ColumnLinear, RowLinear, columns, output_std
from internlm_lite.layers.norm import NORMS, FullRMSNorm, Norm, full_norms
from internlm_lite.layers.recompute import Recipe
from internlm_lite.layers.rope import Rotary, rotation_of
from internlm_lite.layers.scores import attention_rule
from internlm_lite.layers.tensor_parallel import TensorParallelContext, accumulation_dtype


class Attention(CostedLayer):
    """x -> same shape, both outside split layers (layers/tensor_parallel.py). Raises ConfigError as `check_heads`."""

    def __init__(self, name: str, layer: int, config: ModelConfig, tp_ctx: TensorParallelContext) -> None:
        super().__init__()
        check_heads(config, tp_ctx.group.size)
        hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.kv_heads
        self.layer, self.tp_ctx = layer, tp_ctx
        self.rule = attention_rule(config, layer)
        self._pairs = partial(config.attention_pairs, layer)
        self.has_dropout = config.attention_dropout > 0
        self.head_dim = config.head_size
        self.queries = heads // kv_heads  # per key/value head
        rows, bias = kv_heads * (self.queries + 2) * self.head_dim, config.has_qkv_bias
        self.wqkv = ColumnLinear(f"{name}.wqkv", hidden_size, rows, tp_ctx, init_std=config.hidden_std, bias=bias)
        self.wqkv.weight.matrix_rows = (self.queries * self.head_dim, self.head_dim, self.head_dim)
        rows, bias = heads * self.head_dim, config.has_out_bias
        self.wo = RowLinear(f"{name}.wo", rows, hidden_size, tp_ctx, init_std=output_std(config), bias=bias)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if config.qk_norm:
            norm, size = FullRMSNorm if config.qk_norm == "full" else NORMS[config.norm_type], self.head_dim
            self.q_norm = norm(f"{name}.q_norm", config, tp_ctx, heads=(heads, size))
            self.k_norm = norm(f"{name}.k_norm", config, tp_ctx, heads=(kv_heads, size))
        self._rotated = compiled_in_training(Rotary.__call__, wanted=tp_ctx.compiled)
        self._rotated_features = config.rotary_size if rotation_of(config, layer) is not None else 0

    def forward(self, x: torch.Tensor, rotary: Rotary | None, attend: Attend) -> torch.Tensor:
        return self.output(attend(self.rule, *self.project(x, rotary)))

    def project(
        self, x: torch.Tensor, rotary: Rotary | None, recipe: Recipe | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated queries [T, heads, head_dim], rotated keys and values [T, kv_heads, head_dim], of this rank.

        `rotary` None: they are not rotated. `recipe`: of x, as in `columns`."""
        (qkv,) = columns(x, self.wqkv, recipe=recipe)
        heads = qkv.view(qkv.shape[0], -1, self.queries + 2, self.head_dim)  # [T, Hkv, g + 2, D]
        q, k, v = heads.split([self.queries, 1, 1], dim=2)
        if isinstance(self.q_norm, FullRMSNorm) and isinstance(self.k_norm, FullRMSNorm):
            q, k = full_norms((q, k), (self.q_norm, self.k_norm))
        elif self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.tp_ctx.selective and self.q_norm is None:  # a view would keep all of qkv, which nothing else keeps
            v = v.contiguous()
        if rotary is None:
            q, k = q.contiguous(), k.contiguous()
        else:
            q, k = self._rotated(rotary, q), self._rotated(rotary, k)
        return q.flatten(1, 2), k.squeeze(2), v.squeeze(2)

    def output(self, mixed: torch.Tensor) -> torch.Tensor:
        """What `attend` returned, [T, heads, head_dim] -> outside."""
        y: torch.Tensor = self.wo(mixed.flatten(1))
        return y

    def flops_per_token(self, seq_len: int) -> int:
        products = 4 * self._pairs(seq_len) * self.wo.weight.shard_spec.shape[1]  # q k^T, and its softmax times v
        return super().flops_per_token(seq_len) + products // max(seq_len, 1)

    def in_blocks(self, row: RowShape) -> bool:
        """Whether layers/scores.py computes attention, for whatever documents."""
        return row.reference and (self.rule.softcap is not None or self.has_dropout)

    def saved_bytes(self, row: RowShape) -> Bytes:
        """With a window, of documents that are not longer: of others the reference keeps less."""
        weight, output = self.wqkv.weight, self.wo.saved_bytes(row)["projection inputs"]
        kv_heads = weight.shape[0] // (self.queries + 2) // self.head_dim
        rotated = kv_heads * (self.queries + 1) * self.head_dim
        statistics = kv_heads * self.queries * accumulation_dtype(weight.dtype).itemsize
        lean = row.selective and self.q_norm is None
        projected = kv_heads * self.head_dim if lean else weight.shape[0]  # v is a view of the whole output
        in_blocks = self.in_blocks(row) and not in_ring(row)  # statistics and parts of the output are not kept then
        others = kept_keys(row, self._head_bytes())
        if others is not None:
            rotated = kv_heads * self.queries * self.head_dim
            projected *= self.q_norm is not None  # whose input it is
        kept = {
            "queries, keys, values": row.tokens * projected * weight.itemsize + (others or 0),
            "rotated queries, keys": row.tokens * rotated * weight.itemsize,
            "attention output": output * kept_outputs(row, in_blocks=in_blocks),
            "attention statistics": row.tokens * statistics * (not in_blocks),  # log-sum-exp of each query's scores
        }
        normed = [norm.saved_bytes(row) for norm in (self.q_norm, self.k_norm) if norm is not None]
        if self.q_norm is not None and self.q_norm.kept_dtype(row.device) == self.tp_ctx.dtype:
            for one in normed:  # views of the whole output
                del one["norm inputs"]
        return add_bytes(self.wqkv.saved_bytes(row), kept, *normed)

    def messages(self, row: RowShape) -> list[Message]:
        found = super().messages(row) + exchange_messages(row, self._head_bytes())
        if not isinstance(self.q_norm, FullRMSNorm):
            return found
        n_bytes = 2 * row.tokens * accumulation_dtype(self.tp_ctx.dtype).itemsize  # a sum of each token's q and k
        sums = [Message(self.tp_ctx.group.name, "all_reduce", n_bytes, backward=back) for back in (False, True)]
        return found + sums

    def _head_bytes(self) -> HeadBytes:
        weight = self.wqkv.weight
        kv_heads, size = weight.shape[0] // (self.queries + 2) // self.head_dim, self.head_dim * weight.itemsize
        return HeadBytes(kv_heads * self.queries * size, kv_heads * size, kv_heads, self.rule.window)

    def passes(self, row: RowShape) -> list[Pass]:
        """Attention itself, the rotations, and the gradients of queries, keys and values joined to one tensor."""
        joined = row.tokens * self.wqkv.weight.shape[0] * self.wqkv.weight.itemsize
        rotated = joined // (self.queries + 2) * (self.queries + 1)
        kernels = [Pass("attention", 0), Pass("attention", 0, 5, backward=True)]
        moved = self._rotation_passes(row, rotated, joined)
        if "block" not in row.fused:
            moved.append(Pass("contiguous_copy", 2 * joined, backward=True))
            moved.append(Pass("strided_copy", 2 * (joined - rotated), backward=True))
        return super().passes(row) + kernels + moved

    def _rotation_passes(self, row: RowShape, rotated: int, joined: int) -> list[Pass]:
        """`rotated`: bytes of queries and keys; `joined`: with those of values."""
        if "block" in row.fused or ("rotary" in row.fused and self._rotated_features):
            back = 2 * (rotated if "block" not in row.fused else joined)
            return [Pass("fused", 2 * rotated, 2), Pass("fused", back, 2, backward=True)]
        if not self._rotated_features:
            return [Pass("strided_copy", 2 * rotated, 2)]
        # x * cos; x copied and rolled by half a head; addcmul; what is not rotated is joined to it
        turned = rotated * self._rotated_features // self.head_dim
        found = [
            Pass("strided", 5 * turned, 4),
            Pass("strided_copy", 2 * turned, 2),
            Pass("roll", 2 * turned, 2),
            Pass("strided", 5 * turned, 4, backward=True),
            Pass("roll", 2 * turned, 2, backward=True),
        ]
        if turned < rotated:
            found += [Pass("strided_copy", 2 * rotated, 2, backward=backward) for backward in (False, True)]
        return found


def check_heads(config: ModelConfig, tp_size: int) -> None:
    """Raises ConfigError unless heads have an even size, heads % kv_heads == 0 and kv_heads % tp_size == 0."""
    hidden_size, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.kv_heads
    problems = []
    if (config.head_dim is None and hidden_size % heads) or config.head_size % 2:
        problems.append(
            f"model.hidden_size {hidden_size} over {heads} heads, model.head_dim {config.head_dim}: "
            "expected an even number of features per head"
        )
    if heads % kv_heads:
        problems.append(f"model.num_kv_attention_heads {kv_heads}: expected a divisor of num_attention_heads {heads}")
    if kv_heads % tp_size:
        problems.append(f"parallel.tensor {tp_size}: expected a divisor of the {kv_heads} key/value heads")
    if problems:
        raise ConfigError("\n".join(problems))
