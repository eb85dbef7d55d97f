"""Parts of attention by torch's own flash kernels (aten's, which `torch.nn.attention.varlen` calls): half precision on
CUDA, no soft cap, nothing dropped. They return the log-sum-exp, and their backward pass takes that of all keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.kernel_calls import KernelCall
from internlm_lite.layers.partial_attention import Block, Known, Mixed, Parts, ReferenceParts, add_to_rows, rows_of
from internlm_lite.layers.scores import AttentionRule, Drop, scale_of

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def parts_kernel(backend: AttentionBackend, rule: AttentionRule, drop: Drop | None) -> Parts:
    """What computes parts in the place of a kernel of whole documents: `FlashParts` where it knows the rule."""
    if backend is AttentionBackend.SDPA or rule.softcap is not None or drop is not None:
        return ReferenceParts(rule, drop)
    return FlashParts(rule)


@dataclass(frozen=True)
class FlashParts:
    """`layers/partial_attention.py:Parts` by the kernel."""

    rule: AttentionRule

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, mixed: Mixed) -> None:
        for call in block.calls:
            inputs = rows_of(q, call.queries), rows_of(k, call.keys), rows_of(v, call.keys)
            out, lse = self._forward(call, *inputs)
            at = 0
            for rows in call.queries:
                part = slice(at, at + rows[1] - rows[0])
                mixed.add(rows, out[part], lse.T[part])
                at = part.stop

    def backward(
        self, known: Known, k: torch.Tensor, v: torch.Tensor, block: Block, grads: tuple[torch.Tensor, ...]
    ) -> None:
        for call in block.calls:
            q, out, grad = (rows_of(x, call.queries) for x in (known.q, known.out, known.grad))
            lse = rows_of(known.lse, call.queries).T.contiguous()
            found = self._backward(call, grad, q, (rows_of(k, call.keys), rows_of(v, call.keys)), out, lse)
            for total, part, ranges in zip(grads, found, (call.queries, call.keys, call.keys), strict=True):
                add_to_rows(total, ranges, part)

    def _options(self, call: KernelCall, q: torch.Tensor) -> dict[str, float | int]:
        left, right = call.window
        return {"scale": scale_of(self.rule, q.shape[-1]), "window_size_left": left, "window_size_right": right}

    def _forward(self, call: KernelCall, *qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(out [n, H, D], log-sum-exp [H, n])"""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *qkv,
            call.cu_queries,
            call.cu_keys,
            *call.longest,
            0.0,
            call.window == (-1, 0),
            return_debug_mask=False,
            **self._options(call, qkv[0]),
        )
        return out, lse

    def _backward(
        self, call: KernelCall, grad: torch.Tensor, q: torch.Tensor, kv: tuple[torch.Tensor, ...], *saved: torch.Tensor
    ) -> Three:
        """`saved`: out, and its log-sum-exp [H, n]."""
        no_randomness = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        found = torch.ops.aten._flash_attention_backward(
            grad,
            q,
            *kv,
            *saved,
            call.cu_queries,
            call.cu_keys,
            *call.longest,
            0.0,
            call.window == (-1, 0),
            *no_randomness,
            **self._options(call, q),
        )
        return cast(Three, found)
