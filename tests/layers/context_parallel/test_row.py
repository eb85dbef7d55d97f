"""Context parallelism: which tokens a rank has, how much work, and attention over the keys of other ranks."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from itertools import accumulate, pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from internlm_lite.layers.context_parallel import key_gather
from internlm_lite.layers.context_parallel.exchanges import EXCHANGES
from internlm_lite.layers.context_parallel.key_gather import attention_of_pieces, kernel_of_pieces_problem
from internlm_lite.layers.context_parallel.row import (
    CLOSE,
    ContextRow,
    DocumentPiece,
    context_row,
    imbalance,
    layers_by_window,
)
from internlm_lite.layers.dropout import dropped_weights, token_keys
from internlm_lite.layers.flash import AttentionBackend, Bounds, packed_sdpa
from internlm_lite.layers.scores import AttentionRule
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from tests.world import TIMEOUT, run_world

CPU = torch.device("cpu")
FULL = layers_by_window([None])
MIXED = layers_by_window([None, 7, 7])


def row_of(lengths: list[int], size: int, rank: int = 0, windows: tuple[int | None, ...] = (None,)) -> ContextRow:
    return context_row((0, *accumulate(lengths)), layers_by_window(windows), size, rank, CPU)


def lengths_of(tokens: int, dice: random.Random, longest: int) -> list[int]:
    """Document lengths, alike on a logarithmic scale; sometimes one document has half of the row."""
    lengths = [tokens // 2] * dice.randrange(2)
    while sum(lengths) < tokens:
        lengths.append(min(tokens - sum(lengths), int(2 ** dice.uniform(0, longest.bit_length() - 1))))
    dice.shuffle(lengths)
    return lengths


def numbers_of(pieces: tuple[DocumentPiece, ...]) -> list[int]:
    return [n for piece in pieces for n in range(piece.first + piece.start, piece.first + piece.stop)]


# Documents are not padded to multiples of 2 * ranks and boundaries are not divided by the number of ranks, which has
# lost the last tokens of documents of odd lengths elsewhere.
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_every_token_is_on_one_rank_in_a_piece_of_its_document(size: int) -> None:
    dice = random.Random(size)
    rows = [[7 * size], [1] * (8 * size), [698, 7, 3 * size - 705 % size], *([1, 5 * size - 1],) * 2]
    rows += [lengths_of(size * dice.randint(1, 300), dice, 200) for _ in range(30)]
    for lengths in rows:
        lengths += [-sum(lengths) % size]
        boundaries = (0, *accumulate(lengths))
        row = context_row(boundaries, MIXED, size, 0, CPU)
        assert sorted(n for pieces in row.pieces for n in numbers_of(pieces)) == list(range(boundaries[-1]))
        for rank, pieces in enumerate(row.pieces):
            own = numbers_of(pieces)
            assert own == sorted(own) and len(own) == boundaries[-1] // size
            assert context_row(boundaries, MIXED, size, rank, CPU).own.tolist() == own
            for piece in pieces:
                assert piece.length > 0, "kernels have failed at documents without tokens"
                assert piece.first == boundaries[piece.document]
                assert 0 <= piece.start < piece.stop <= lengths[piece.document]
            assert all(a.document != b.document or a.stop < b.start for a, b in pairwise(pieces)), "could be one piece"


def test_documents_without_tokens_and_padding_are_in_no_piece() -> None:
    padded = context_row((0, 3, 3, 8, 8, 8), FULL, 2, 0, CPU)
    assert [[(p.document, p.start, p.stop) for p in own] for own in padded.pieces] == [
        [(p.document if p.document == 0 else 2, p.start, p.stop) for p in own]
        for own in context_row((0, 3, 8), FULL, 2, 0, CPU).pieces
    ]


def test_one_document_is_cut_from_both_ends() -> None:
    row = row_of([80], 4)
    ends = [[(0, 10), (70, 80)], [(10, 20), (60, 70)], [(20, 30), (50, 60)], [(30, 50)]]
    assert [row.spans(rank) for rank in range(4)] == ends
    assert len(set(row.work(FULL))) == 1


def test_whole_documents_stay_whole_where_that_is_balanced() -> None:
    assert row_of([4096] * 8, 4).pieces[1] == tuple(DocumentPiece(n, 4096 * n, 0, 4096) for n in (2, 3))


def test_a_window_counts_what_it_sees() -> None:
    piece = DocumentPiece(0, 0, 5, 20)
    for window in (None, 1, 3, 7, 19, 20, 40):
        seen = [[key for key in range(20) if key <= n and (window is None or n - key < window)] for n in range(5, 20)]
        assert piece.pairs(window) == sum(map(len, seen))
        assert piece.before(window) == 5 - min(seen[0])


# One cut serves layers of all kinds, because a token is on one rank; it balances the sum of their work.
@pytest.mark.parametrize("layers", [FULL, layers_by_window([None] * 2 + [512] * 6)], ids=["full", "windows"])
def test_ranks_have_equal_work_whatever_the_documents(layers: dict[int | None, int]) -> None:
    dice, found = random.Random(3), []
    for size in (2, 4, 8):
        for tokens in (4096, 32768):
            rows = [lengths_of(tokens, dice, longest) for longest in (64, 1024, tokens) for _ in range(4)]
            for lengths in rows:
                row = context_row((0, *accumulate(lengths)), layers, size, 0, CPU)
                found.append((imbalance(row.pieces, layers), size, tokens, max(map(len, row.pieces))))
    print(f"work of the busiest rank over the mean: at most {max(found)[0]:.4f}, on average ", end="")
    print(f"{sum(one[0] for one in found) / len(found):.4f} in {len(found)} random rows")
    assert max(found)[0] <= CLOSE, max(found)


CASES: dict[str, tuple[list[int], AttentionRule, float]] = {
    "one document": ([64], AttentionRule(), 0),
    "long and short": ([1, 40, 2, 2, 19], AttentionRule(), 0),
    "short": ([3, 5, 8, 16, 1, 7, 9, 15], AttentionRule(scale=0.3), 0),
    "window": ([50, 14], AttentionRule(window=6), 0),
    "window of one token": ([50, 14], AttentionRule(window=1), 0),
    "soft cap": ([30, 34], AttentionRule(softcap=2.0), 0),
    "dropped weights": ([7, 57], AttentionRule(layer=3), 0.4),
    "window, dropped weights": ([7, 57], AttentionRule(window=9), 0.4),
}
HEADS, KV_HEADS, DIM = 6, 2, 4


def inputs_of(lengths: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v of a row, and a gradient of the output."""
    generator = torch.Generator().manual_seed(len(lengths))
    shapes = [(sum(lengths), heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output, and gradients of q, k and v."""
    *leaves, grad = (x.clone() for x in inputs)
    out = attend(*(x.requires_grad_() for x in leaves))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


class Sent(TorchDispatchMode):
    """Notes the bytes that collectives are given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname in ("send", "alltoall_base_"):
            tensor = args[0] if func._opname == "alltoall_base_" else args[0][0]
            self.calls.append((func._opname, tensor.nbytes))
        return func(*args, **(kwargs or {}))


def on_rank(mesh: Mesh, exchange: str, lengths: list[int], rule: AttentionRule, p: float, dtype: torch.dtype):
    """(numbers of the own tokens, `run` of them, the collectives)"""
    windows = layers_by_window([rule.window, None])
    row = context_row((0, *accumulate(lengths)), windows, mesh.cp.size, mesh.cp.rank, CPU)
    keys = token_keys(1, 2, torch.tensor([5]), sum(lengths))[0]
    drop = dropped_weights(p, keys, 0) if p else None
    attend = EXCHANGES[exchange](row, mesh.cp, AttentionBackend.SDPA, drop)
    with Sent() as sent:
        found = run(lambda q, k, v: attend(rule, q, k, v), [row.cut(x, 0) for x in inputs_of(lengths, dtype)])
    return row.own, found, sent.calls


def on_ranks(world: Mesh, exchange: str, dtype: torch.dtype):
    mesh = build_mesh(sizes_of(world.world.size, 1, 1, -1, world.world.size), world.rank, CPU, TIMEOUT)
    return {name: on_rank(mesh, exchange, *case, dtype) for name, case in CASES.items()}


def whole(lengths: list[int], rule: AttentionRule, p: float, dtype: torch.dtype) -> list[torch.Tensor]:
    keys = token_keys(1, 2, torch.tensor([5]), sum(lengths))[0]
    attend = packed_sdpa((0, *accumulate(lengths)), dropped_weights(p, keys, 0) if p else None)
    return run(lambda q, k, v: attend(rule, q, k, v), inputs_of(lengths, dtype))


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_compute_the_attention_of_the_whole_row(exchange: str) -> None:
    """A query group is not repeated for its key head, neither in the product nor on the way."""
    ranks = run_world(on_ranks, 2, (exchange, torch.float64))
    for name, case in CASES.items():
        expected = whole(*case, torch.float64)
        for own, found, _ in (rank[name] for rank in ranks):
            for ours, all_tokens in zip(found, expected, strict=True):
                torch.testing.assert_close(ours, all_tokens[own], rtol=1e-12, atol=1e-13, msg=f"{name}: {own}")


def test_a_gather_moves_the_key_heads_that_there_are_and_nothing_else() -> None:
    ranks = run_world(on_ranks, 4, ("gather", torch.float32))
    part = 64 // 4 * 2 * KV_HEADS * DIM * 4
    for calls in (rank["long and short"][2] for rank in ranks):
        assert calls == [("send", part)] * 3 + [("alltoall_base_", 4 * part)]


# Partial sums in bf16, one for each rank, made gradients worse with every rank in a ring elsewhere, while the loss was
# right: here what ranks send is rounded once, and summed in fp32.
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_errors_in_half_precision_do_not_grow_with_the_number_of_ranks(exchange: str) -> None:
    worst = {}
    for size in (2, 4) if KV_HEADS % 4 and exchange == "ulysses" else (2, 4, 8):
        if exchange == "ulysses" and KV_HEADS % size:
            continue
        ranks = run_world(on_ranks, size, (exchange, torch.bfloat16))
        for name in ("one document", "long and short"):
            inputs = [x.double() for x in inputs_of(CASES[name][0], torch.bfloat16)]
            attend = packed_sdpa((0, *accumulate(CASES[name][0])))
            expected = run(lambda q, k, v, attend=attend: attend(AttentionRule(), q, k, v), inputs)
            for part, right in enumerate(expected):
                ours = torch.zeros_like(right)
                for own, found, _ in (rank[name] for rank in ranks):
                    ours[own] = found[part].double()
                error = ((ours - right).norm() / right.norm()).item()
                worst[size] = max(worst.get(size, 0), error)
    print(f"{exchange}: relative errors by number of ranks {worst}")
    assert max(worst.values()) < 1.3 * worst[2] < 0.02


def test_the_same_bits_each_time() -> None:
    first, second = (run_world(on_ranks, 4, ("gather", torch.float32)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in CASES:
            assert all(map(torch.equal, one[name][1], other[name][1])), name


def by_value(bounds: Bounds, rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A varlen kernel for the CPU, whose last query sees the last key, as in flash-attn from 2.1 on."""
    queries, keys = bounds.queries.tolist(), bounds.keys.tolist()
    lengths = [b - a for a, b in pairwise(queries)]
    assert min(lengths) > 0 and max(lengths) <= bounds.most_queries and type(bounds.most_queries) is int
    assert max(b - a for a, b in pairwise(keys)) <= bounds.most_keys and type(bounds.most_keys) is int
    parts = []
    for (a, b), (c, d) in zip(pairwise(queries), pairwise(keys), strict=True):
        at = torch.arange(d - c - (b - a), d - c)[:, None]
        seen = (torch.arange(d - c) <= at) & (at - torch.arange(d - c) < (rule.window or d - c))
        own = [x.transpose(0, 1).repeat_interleave(HEADS // x.shape[1], 0) for x in (q[a:b], k[c:d], v[c:d])]
        parts.append(torch.nn.functional.scaled_dot_product_attention(*own, attn_mask=seen).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("window", [None, 6])
def test_kernels_are_given_the_keys_in_sight_of_each_piece(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boundaries come from documents, not from the positions of a rank's own tokens, which begin anywhere."""
    monkeypatch.setattr(key_gather, "varlen_kernel", lambda backend: by_value)
    kernel_of_pieces_problem.cache_clear()
    rule = AttentionRule(window=window)
    for lengths in ([64], [1, 40, 2, 2, 19]):
        q, k, v, _ = inputs_of(lengths, torch.float64)
        expected = packed_sdpa((0, *accumulate(lengths)))(rule, q, k, v)
        for rank in range(4):
            row = row_of(lengths, 4, rank, (window,))
            pieces = row.pieces[rank]
            seen = [range(p.first + p.start - p.before(window), p.first + p.stop) for p in pieces]
            at = torch.tensor([n for part in seen for n in part])
            attend = attention_of_pieces(pieces, CPU, AttentionBackend.FLASH_ATTN)
            found = attend(rule, row.cut(q, 0), k[at], v[at])
            torch.testing.assert_close(found, expected[row.own], rtol=1e-12, atol=1e-13)
    assert not kernel_of_pieces_problem(AttentionBackend.FLASH_ATTN, rule, (HEADS, KV_HEADS, DIM), q.dtype, CPU)


def test_a_kernel_that_aligns_queries_with_the_first_keys_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As flash-attn before 2.1, and scaled_dot_product_attention with is_causal, do."""

    def top_left(
        bounds: Bounds, rule: AttentionRule, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        parts = []
        for (a, b), (c, d) in zip(pairwise(bounds.queries.tolist()), pairwise(bounds.keys.tolist()), strict=True):
            own = [x.transpose(0, 1).repeat_interleave(HEADS // x.shape[1], 0) for x in (q[a:b], k[c:d], v[c:d])]
            parts.append(torch.nn.functional.scaled_dot_product_attention(*own, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(logging.getLogger("internlm_lite"), "propagate", True)
    monkeypatch.setattr(key_gather, "varlen_kernel", lambda backend: top_left)
    kernel_of_pieces_problem.cache_clear()
    q, k, v, _ = inputs_of([64], torch.float32)
    row = row_of([64], 4, 1)
    seen = torch.tensor([n for p in row.pieces[1] for n in range(p.stop)])
    found = attention_of_pieces(row.pieces[1], CPU, AttentionBackend.FLASH_ATTN)(
        AttentionRule(), row.cut(q, 0), k[seen], v[seen]
    )
    torch.testing.assert_close(found, packed_sdpa((0, 64))(AttentionRule(), q, k, v)[row.own], rtol=1e-5, atol=1e-6)
    assert caplog.text.count("flash-attn went wrong: relative error") == 1
    kernel_of_pieces_problem.cache_clear()


def test_a_kernel_is_compared_inside_a_block_that_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison keeps tensors of its own, once: not in the recomputation."""
    monkeypatch.setattr(key_gather, "varlen_kernel", lambda backend: by_value)
    inputs = inputs_of([64], torch.float64)
    attend = attention_of_pieces((DocumentPiece(0, 0, 0, 64),), CPU, AttentionBackend.FLASH_ATTN)
    kernel_of_pieces_problem.cache_clear()
    found = run(lambda *qkv: checkpoint(attend, AttentionRule(), *qkv, use_reentrant=False), inputs)
    for ours, right in zip(found, run(lambda *qkv: packed_sdpa((0, 64))(AttentionRule(), *qkv), inputs), strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-13)
    kernel_of_pieces_problem.cache_clear()
