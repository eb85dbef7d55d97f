"""Ring attention: keys and values go around the ranks that share a row, queries stay (arXiv:2310.01889).

    leg s     send the own block to rank + s, receive that of rank - s          while leg s - 1 is computed
              attention over it, merged into what there is                      partial_attention.py
    backward  the same blocks once more; the gradients of each go back to its owner, which adds them up

A block goes straight to the rank that needs it, not from hand to hand, so it holds only the tokens that some query of
the receiver sees (ring_parts.py): documents that end on their rank travel nowhere, windows send their reach, and where
no document is shared nothing is sent at all. Gradients travel in the dtype of the model, rounded once, and are
added in the dtype of sums, always in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from internlm_lite.layers.context_parallel.flash_parts import parts_kernel
from internlm_lite.layers.context_parallel.partial_attention import KeyBlock, Known, Mixed, Parts, add_to_rows, rows_of
from internlm_lite.layers.context_parallel.ring_parts import Leg, Part, Range, Span, legs_of, length, parts_between
from internlm_lite.layers.context_parallel.row import ContextRow, DocumentPiece, numbers
from internlm_lite.layers.costs import Message
from internlm_lite.layers.flash import Attend, AttentionBackend
from internlm_lite.layers.scores import AttentionRule, Drop
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group


@dataclass(frozen=True)
class Course:
    """What this rank exchanges and computes for layers of one window."""

    group: Group
    own: KeyBlock
    legs: tuple[tuple[Leg, KeyBlock], ...]


def ring(row: ContextRow, group: Group, backend: AttentionBackend, drop: Drop | None = None) -> Attend:
    """Attention of this rank's tokens, [T / k, H, D], over those of all ranks of `group`. Collective over `group`.

    `drop`: by numbers of tokens in the row, as layers/flash.py:packed takes it. Does not read the device."""
    courses = cache(lambda window: plan_course(row, group, window, numbered=drop is not None))

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        kernel = parts_kernel(backend, rule, drop, q, k.shape[1])
        out: torch.Tensor = _RingAttention.apply(q, k, v, kernel, courses(rule.window))
        return out

    return attend


def ring_messages(row: ContextRow, window: int | None, token_bytes: int) -> list[Message]:
    """What this rank sends for a layer of this window in a forward and a backward pass; `token_bytes`: of a token's
    keys and values. Ranks send unlike amounts: each what others see of its tokens."""
    found = []
    for leg in legs_of([_spans(pieces) for pieces in row.pieces], row.rank, window):
        there, back = length(leg.sent) * token_bytes, length(leg.tokens) * token_bytes
        found += [Message("cp", "send", there, backward=backward) for backward in (False, True) if there]
        found += [Message("cp", "send", back, backward=True)] if back else []
    return found


def plan_course(row: ContextRow, group: Group, window: int | None, *, numbered: bool) -> Course:
    """`numbered`: blocks know their tokens, for dropped weights."""
    spans = [_spans(pieces) for pieces in row.pieces]

    def block(parts: tuple[Part, ...], source: int, ranges: Sequence[Range] | None = None) -> KeyBlock:
        if not numbered:
            return KeyBlock(parts, row.device)
        keys = numbers(row.spans(source), row.device)
        return KeyBlock(parts, row.device, row.own, keys if ranges is None else rows_of(keys, ranges))

    own = block(parts_between(spans[row.rank], spans[row.rank], window), row.rank)
    legs = legs_of(spans, row.rank, window)
    return Course(group, own, tuple((leg, block(leg.parts, leg.source, leg.tokens)) for leg in legs))


def _spans(pieces: Sequence[DocumentPiece]) -> list[Span]:
    return [(piece.document, piece.first + piece.start, piece.first + piece.stop) for piece in pieces]


class _RingAttention(torch.autograd.Function):
    """q [n, H, D], k, v [n, Hkv, D] of this rank's tokens -> [n, H, D]."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kernel: Parts, course: Course) -> Any:
        mixed = Mixed.nothing(q)
        for _, block, keys, values in _blocks(course, k, v):
            kernel.forward(q, keys, values, block, mixed)
        out = mixed.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, mixed.lse)
        ctx.kernel, ctx.course = kernel, course
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        known = Known(q, out, grads[0].contiguous(), lse)
        of_q = torch.zeros_like(q, dtype=lse.dtype)
        of_kv = k.new_zeros(k.shape[0], 2 * k.shape[1], k.shape[2], dtype=lse.dtype)
        returning: list[_Returning] = []
        for leg, block, keys, values in _blocks(course := ctx.course, k, v):
            if leg is None:
                ctx.kernel.backward(known, keys, values, block, (of_q, *of_kv.chunk(2, dim=1)))
                continue
            of_block = of_kv.new_zeros(keys.shape[0], *of_kv.shape[1:])
            ctx.kernel.backward(known, keys, values, block, (of_q, *of_block.chunk(2, dim=1)))
            returning.append(_Returning(leg, of_block.to(k.dtype), course.group))
            for earlier in returning[:-1]:  # behind a block's computation, in which they came
                earlier.add_to(of_kv)
            returning = returning[-1:]
        for last in returning:
            last.add_to(of_kv)
        return of_q.to(q.dtype), *(x.to(k.dtype) for x in of_kv.chunk(2, dim=1)), None, None


def _blocks(
    course: Course, k: torch.Tensor, v: torch.Tensor
) -> Iterator[tuple[Leg | None, KeyBlock, torch.Tensor, torch.Tensor]]:
    """(leg, block, its keys, its values): the own block, then those of others. The next leg is under way meanwhile."""
    if not any(leg.sent or leg.parts for leg, _ in course.legs):
        yield None, course.own, k, v
        return
    own = torch.cat([k, v], dim=1)
    coming = [_Coming(course.legs[0][0], own, course.group)]
    yield None, course.own, k, v
    for number, (leg, block) in enumerate(course.legs, start=1):
        received = coming.pop().wait()
        if number < len(course.legs):
            coming.append(_Coming(course.legs[number][0], own, course.group))
        keys, values = received.chunk(2, dim=1)
        yield leg, block, keys, values


class _Coming:
    """Keys and values of a leg on their way."""

    def __init__(self, leg: Leg, own: torch.Tensor, group: Group) -> None:
        self._sent = rows_of(own, leg.sent)
        self._received = own.new_empty(length(leg.tokens), *own.shape[1:])
        self._work = _trade(self._sent, leg.to, self._received, leg.source, group)

    def wait(self) -> torch.Tensor:
        self._work.wait()
        return self._received


class _Returning:
    """Gradients of a leg's keys and values on their way to their owner, and those of the own keys and values."""

    def __init__(self, leg: Leg, of_block: torch.Tensor, group: Group) -> None:
        self._rows, self._sent = leg.sent, of_block
        self._received = of_block.new_empty(length(leg.sent), *of_block.shape[1:])
        self._work = _trade(of_block, leg.source, self._received, leg.to, group)

    def add_to(self, of_kv: torch.Tensor) -> None:
        self._work.wait()
        add_to_rows(of_kv, self._rows, self._received)


def _trade(sent: torch.Tensor, to: int, received: torch.Tensor, source: int, group: Group) -> comm.Work:
    """Tensors without elements stay where they are."""
    return comm.send_and_receive(
        (sent, to) if sent.numel() else None, (received, source) if received.numel() else None, group
    )
