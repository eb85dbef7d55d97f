"""Parts of attention by torch's own flash kernels (aten's, which `torch.nn.attention.varlen` calls): half precision on
CUDA, no soft cap, nothing dropped. They return the log-sum-exp, and their backward pass takes that of all keys."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch

from internlm_lite.layers.context_parallel.kernel_calls import KernelCall
from internlm_lite.layers.context_parallel.partial_attention import (
    KeyBlock,
    Known,
    Mixed,
    Parts,
    ReferenceParts,
    add_to_rows,
    rows_of,
)
from internlm_lite.layers.context_parallel.ring_parts import length, parts_between
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.layers.scores import AttentionRule, Drop, scale_of
from internlm_lite.mesh import comm

logger = logging.getLogger("internlm_lite")
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class FlashParts:
    """`layers/context_parallel/partial_attention.py:Parts` by the kernel."""

    rule: AttentionRule

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, mixed: Mixed) -> None:
        for call in block.calls:
            inputs = rows_of(q, call.queries), rows_of(k, call.keys), rows_of(v, call.keys)
            out, lse = self._forward(call, *inputs)
            at = 0
            for rows in call.queries:
                part = slice(at, at + rows[1] - rows[0])
                mixed.add(rows, out[part], lse.T[part])
                at = part.stop

    def backward(
        self, known: Known, k: torch.Tensor, v: torch.Tensor, block: KeyBlock, grads: tuple[torch.Tensor, ...]
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


def parts_kernel(
    backend: AttentionBackend, rule: AttentionRule, drop: Drop | None, q: torch.Tensor, kv_heads: int
) -> Parts:
    """What computes parts for queries like q [n, H, D] in the place of a kernel of whole documents: `FlashParts` where
    it knows the rule and agrees with the reference on this device."""
    if backend is AttentionBackend.SDPA or rule.softcap is not None or drop is not None:
        return ReferenceParts(rule, drop)
    if q.is_meta:
        return FlashParts(rule)
    tested = AttentionRule(window=None if rule.window is None else min(rule.window, TESTED_WINDOW), scale=rule.scale)
    wrong = parts_problem(tested, (*q.shape[1:], kv_heads), q.dtype, q.device)
    return ReferenceParts(rule) if wrong else FlashParts(rule)


TESTED_WINDOW = 100
MINE = ((0, 0, 1), (1, 1, 100), (2, 130, 300), (2, 600, 900))
THEIRS = ((1, 100, 130), (2, 300, 600), (2, 900, 1000))
LIMIT = 2e-2
"""Of the relative error in half precision, as in layers/flash.py."""


@cache
def parts_problem(rule: AttentionRule, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """What is wrong with the kernel, forward or backward, for heads, features and key heads of `shape`; empty: nothing.
    Computed, and told, once."""
    heads, features, kv_heads = shape
    generator = torch.Generator(device).manual_seed(0)
    tokens = [length([span[1:] for span in spans]) for spans in (MINE, THEIRS)]
    shapes = [(tokens[0], heads), *[(sum(tokens), kv_heads)] * 2, (tokens[0], heads)]
    inputs = [torch.randn(*size, features, generator=generator, device=device).to(dtype) for size in shapes]
    problem = ""
    try:
        found = _computed(FlashParts(rule), tokens, inputs)
        expected = _computed(ReferenceParts(rule), tokens, [x.float() for x in inputs])
        errors = [(a.float() - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
        worst = comm.read(torch.stack(errors).max())
        if not worst < LIMIT:
            problem = f"relative error {worst:.1e} against the reference, expected at most {LIMIT}"
    except (RuntimeError, TypeError, NotImplementedError) as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    if problem:
        logger.warning(f"attention in a ring: torch's kernel went wrong: {problem}; plain operations take its place")
    return problem


def _computed(kernel: Parts, tokens: list[int], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """[output, gradients of q, k and v] of a rank with MINE beside one with THEIRS."""
    q, k, v, grad = inputs
    blocks = [KeyBlock(parts_between(MINE, spans, kernel.rule.window), q.device) for spans in (MINE, THEIRS)]
    mixed = Mixed.nothing(q)
    grads = [torch.zeros_like(x, dtype=mixed.lse.dtype) for x in (q, k, v)]
    for block, keys, values in zip(blocks, k.split(tokens), v.split(tokens), strict=True):
        kernel.forward(q, keys, values, block, mixed)
    known = Known(q, mixed.out.to(q.dtype), grad, mixed.lse)
    of_k, of_v = (x.split(tokens) for x in grads[1:])
    for n, (block, keys, values) in enumerate(zip(blocks, k.split(tokens), v.split(tokens), strict=True)):
        kernel.backward(known, keys, values, block, (grads[0], of_k[n], of_v[n]))
    return [known.out, *grads]
