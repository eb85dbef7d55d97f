"""Context parallelism by gathering keys and values: each rank has all that its own queries see, layer by layer.

    k, v [T / cp, Hkv, D] --all-gather--> those of all ranks --> of each piece, from the first key in sight on
    their gradients <--all-to-all, then a sum in fp32-- those of the pieces, added up in fp32 on each rank

Ranks hold only the key/value heads of their tensor-parallel part, and no head is repeated for its group of queries. The
sums over pieces and ranks have the order of tokens and ranks, so they have the same bits each time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from internlm_lite.layers.context_parallel.kernel_calls import sequence_boundaries
from internlm_lite.layers.context_parallel.row import ContextRow, DocumentPiece, joined, numbers
from internlm_lite.layers.flash import (
    KERNEL_LIMIT,
    Attend,
    AttentionBackend,
    Bounds,
    attend_within,
    varlen_kernel,
    with_gradients,
)
from internlm_lite.layers.scores import AttentionRule, Drop, EqualDocuments
from internlm_lite.layers.tensor_parallel import accumulation_dtype
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group

logger = logging.getLogger("internlm_lite")


def gathered(row: ContextRow, group: Group, backend: AttentionBackend, drop: Drop | None) -> Attend:
    """Attention of this rank's tokens of `row`: q [T / cp, H, D], k, v [T / cp, Hkv, D] -> as q. Collective over
    `group` in each call, forward and backward. `drop` is given numbers of the whole row."""
    pieces = row.pieces[row.rank]
    plans = cache(partial(_plan, row))
    within = attention_of_pieces(pieces, row.device, backend, drop)

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        keys, values = _Gather.apply(k, v, group, plans(rule.window))
        return within(rule, q, keys, values)

    return attend


def attention_of_pieces(
    pieces: Sequence[DocumentPiece], device: torch.device, backend: AttentionBackend, drop: Drop | None = None
) -> Attend:
    """(rule, q [n, H, D], k, v [m, Hkv, D]) -> as q: queries of the pieces one after another, and for each piece the
    keys in front of it that it sees (`DocumentPiece.before`), then its own. A kernel that does not agree with the
    reference on this device is not used."""
    reference = partial(_one_by_one, pieces, drop)
    if backend is AttentionBackend.SDPA:
        return reference
    kernel = _in_one_call(pieces, device, backend)

    def attend(rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tested = replace(rule, layer=0, window=None if rule.window is None else min(rule.window, TESTED_WINDOW))
        heads = q.shape[1], k.shape[1], q.shape[2]
        suits = not kernel_of_pieces_problem(backend, tested, heads, q.dtype, q.device)
        return (kernel if suits else reference)(rule, q, k, v)

    return attend


def _in_one_call(pieces: Sequence[DocumentPiece], device: torch.device, backend: AttentionBackend) -> Attend:
    lengths = [piece.length for piece in pieces]
    queries = sequence_boundaries(lengths, device)

    @cache
    def bounds(window: int | None) -> Bounds:
        keys = [piece.before(window) + piece.length for piece in pieces]
        return Bounds(queries, sequence_boundaries(keys, device), max(lengths), max(keys))

    kernel = varlen_kernel(backend)
    return lambda rule, q, k, v: kernel(bounds(rule.window), rule, q, k, v)


TESTED = (
    DocumentPiece(0, 0, 0, 1),
    DocumentPiece(1, 1, 99, 199),
    DocumentPiece(1, 1, 600, 900),
    DocumentPiece(2, 1001, 0, 300),
)
TESTED_WINDOW = 100


@cache
def kernel_of_pieces_problem(
    backend: AttentionBackend,
    rule: AttentionRule,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> str:
    """What is wrong with a kernel whose sequences have more keys than queries, forward or backward; empty: nothing.
    `heads`: of queries, of keys, and their features. Computed, and told, once."""
    generator = torch.Generator(device).manual_seed(0)
    n = sum(piece.length for piece in TESTED)
    m = n + sum(piece.before(rule.window) for piece in TESTED)
    shapes = ((n, heads[0]), (m, heads[1]), (m, heads[1]), (n, heads[0]))
    inputs = [torch.randn(*shape, heads[2], generator=generator, device=device).to(dtype) for shape in shapes]
    problem = ""
    try:
        # Hooks of its own, or a recomputed block around it would keep, and miss, what this saves.
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
            found = with_gradients(partial(_in_one_call(TESTED, device, backend), rule), inputs, dtype)
            wide = accumulation_dtype(dtype)
            expected = with_gradients(partial(_one_by_one, TESTED, None, rule), [x.to(wide) for x in inputs], wide)
        errors = [(a.to(wide) - b).norm() / b.norm() for a, b in zip(found, expected, strict=True)]
        worst = comm.read(torch.stack(errors).max())
        if not worst < KERNEL_LIMIT:
            problem = f"relative error {worst:.1e} against the reference, expected at most {KERNEL_LIMIT}"
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        problem = f"{type(error).__name__}: {str(error)[:300]}"
    if problem:
        logger.warning(
            f"attention of parts of documents: {backend.value} went wrong: {problem}; plain operations take its place"
        )
    return problem


def _one_by_one(
    pieces: Sequence[DocumentPiece],
    drop: Drop | None,
    rule: AttentionRule,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """The reference."""
    lengths = [piece.length for piece in pieces]
    reach = [piece.before(rule.window) for piece in pieces]
    of_keys = [before + length for before, length in zip(reach, lengths, strict=True)]
    parts = zip(pieces, reach, q.split(lengths), k.split(of_keys), v.split(of_keys), strict=True)
    return torch.cat(
        [
            attend_within(rule, q, k, v, EqualDocuments(1, piece.length, piece.first + piece.start, before), drop)
            for piece, before, q, k, v in parts
        ]
    )


@dataclass(frozen=True)
class _Plan:
    """Which of the gathered keys the pieces of a rank see."""

    keys: torch.Tensor
    """[m] int64: rows of [cp, 2, T / cp], where the keys of a rank are in front of its values."""
    runs: tuple[slice, ...]
    """Parts of `keys` in which no row occurs twice, so that gradients can be added in any order."""


def _plan(row: ContextRow, window: int | None) -> _Plan:
    order = numbers([span for rank in range(row.size) for span in row.spans(rank)], row.device)
    each = row.tokens // row.size
    at = torch.arange(row.tokens, device=row.device)
    place = torch.empty_like(order)
    place[order] = at + at // each * each
    pieces = row.pieces[row.rank]
    starts = [piece.first + piece.start - piece.before(window) for piece in pieces]
    spans = [(start, piece.first + piece.stop) for start, piece in zip(starts, pieces, strict=True)]
    borders, end, last = [0], 0, 0
    for start, stop in spans:
        if start < last:  # keys that the piece before sees, too
            borders.append(end)
        end, last = end + stop - start, stop
    runs = tuple(slice(*ends) for ends in zip(borders, [*borders[1:], end], strict=True))
    return _Plan(place[numbers(joined(spans), row.device)], runs)


class _Gather(torch.autograd.Function):
    """k, v [n, Hkv, D] -> keys and values of the pieces, [m, Hkv, D] each."""

    @staticmethod
    def forward(ctx: Any, k: torch.Tensor, v: torch.Tensor, group: Group, plan: _Plan) -> Any:
        ctx.group, ctx.plan, ctx.shape = group, plan, k.shape
        full = k.new_empty(group.size, 2, *k.shape)
        full[group.rank, 0], full[group.rank, 1] = k, v
        comm.all_gather(full.view(-1), group).wait()
        rows = full.flatten(0, 2)
        return rows.index_select(0, plan.keys), rows.index_select(0, plan.keys + len(k))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        group, plan, dtype = ctx.group, ctx.plan, grads[0].dtype
        wide = accumulation_dtype(dtype)
        sums = grads[0].new_zeros(group.size, 2, *ctx.shape, dtype=wide)
        rows = sums.flatten(0, 2)
        for kind, grad in enumerate(grads):
            for run in plan.runs:
                rows.index_add_(0, plan.keys[run] + kind * ctx.shape[0], grad[run].to(wide))
        sent = sums.to(dtype)
        received = torch.empty_like(sent)
        comm.all_to_all(received.view(-1), sent.view(-1), group).wait()
        k, v = received.sum(0, dtype=wide).to(dtype)
        return k, v, None, None
