"""Who writes what: every held element once, evenly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.checkpoint.format.regions import Region, tiling_problems, volume
from internlm_lite.checkpoint.format.shards import describe
from internlm_lite.checkpoint.save.write_plan import plan_writes
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.layout import LocalShard
from tests.checkpoint.pieces import MODEL, ROLES, pieces_of, whole


def _shards(size: int, **layout: int) -> list:
    return [[describe(piece) for piece in pieces_of(rank, fill=True, **layout)] for rank in range(size)]


LAYOUTS = [
    (size, tp, zero) for zero in (1, 2, 4) for tp in (1, 2, 4) for size in (1, 2, 4, 8) if size % (tp * zero) == 0
]


@pytest.mark.parametrize(("size", "tp", "zero"), LAYOUTS)
def test_every_element_is_written_once_by_a_holder(size: int, tp: int, zero: int) -> None:
    items = plan_writes(_shards(size, tp=tp, zero=zero))
    for role in ROLES:
        for name, (shape, _) in MODEL.items():
            mine = [
                (f"rank {rank}", item.region)
                for rank, theirs in enumerate(items)
                for item in theirs
                if (item.shard.role, item.shard.name) == (role, name)
            ]
            assert tiling_problems(shape, mine) == []
    for rank, theirs in enumerate(items):
        pieces = pieces_of(rank, tp=tp, zero=zero, fill=True)
        assert len({item.key for item in theirs}) == len(theirs)
        for item in theirs:
            piece = pieces[item.index]
            true = whole(piece.role, piece.name, piece.shape)[tuple(slice(a, b) for a, b in item.region.box)]
            assert torch.equal(item.of(piece).reshape(-1), true.reshape(-1)[slice(*item.region.span)])


def test_replicas_share_the_work() -> None:
    items = plan_writes(_shards(8, tp=1, zero=2))
    load = [sum(item.region.count for item in theirs) for theirs in items]
    assert max(load) < 2 * min(load), load


def test_ranges_cut_differently_are_cut_again() -> None:
    box = ((0, 10), (0, 2))

    def piece(a: int, b: int) -> LocalShard:
        return LocalShard("tied", "master", (10, 2), box, (a, b), torch.arange(float(a), float(b)))

    held = [[piece(0, 10)], [piece(10, 20)], [piece(0, 15)], [piece(15, 20)], [piece(4, 4)]]
    items = plan_writes([[describe(p) for p in pieces] for pieces in held])
    assert tiling_problems((10, 2), [("", item.region) for theirs in items for item in theirs]) == []
    assert items[4] == []
    values = [item.of(held[rank][0]) for rank, theirs in enumerate(items) for item in theirs]
    assert sorted(torch.cat(values).tolist()) == list(range(20))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=4), min_size=1, max_size=5))
def test_any_overlapping_ranges_are_written_once(spans: list[list[tuple[int, int]]]) -> None:
    box = ((0, 12),)
    held = [
        [
            describe(LocalShard("t", "master", (12,), box, (a, b), torch.zeros(b - a)))
            for a, b in (sorted(pair) for pair in theirs)
        ]
        for theirs in spans
    ]
    items = plan_writes(held)
    union = {n for theirs in spans for pair in theirs for n in range(*sorted(pair))}
    written = [n for theirs in items for item in theirs for n in range(*item.region.span)]
    assert sorted(written) == sorted(union)
    for theirs in items:
        assert len({item.key for item in theirs}) == len(theirs)
        for item in theirs:
            a, b = item.shard.flat_range
            assert a <= item.region.span[0] and item.region.span[1] <= b


def test_whole_boxes_are_stored_as_boxes() -> None:
    (items,) = plan_writes(_shards(1))
    assert all(item.region.flat_range is None for item in items)
    assert {item.key for item in items} == {f"{role}/{name}" for role in ROLES for name in MODEL}
    assert all(item.region.count == volume(item.region.box) for item in items)


def test_disagreeing_ranks_and_wrong_sizes_are_named() -> None:
    def piece(shape: tuple[int, ...], dtype: torch.dtype, numel: int) -> LocalShard:
        box = tuple((0, n) for n in shape)
        return LocalShard("w", "master", shape, box, None, torch.zeros(numel, dtype=dtype))

    one, two = describe(piece((4,), torch.float32, 4)), describe(piece((4,), torch.float16, 4))
    with pytest.raises(CheckpointError, match="master of w: rank 1 holds F16 of shape"):
        plan_writes([[one], [two]])
    with pytest.raises(CheckpointError, match="5 elements, expected a contiguous one of 4"):
        describe(piece((4,), torch.float32, 5))
    strided = LocalShard("w", "master", (4, 4), ((0, 4), (0, 4)), None, torch.zeros(4, 4).t()[:, :])
    with pytest.raises(CheckpointError, match="strided"):
        describe(strided)
    with pytest.raises(CheckpointError, match="complex64 cannot be stored"):
        describe(piece((4,), torch.complex64, 4))
    assert Region(((0, 4),)).count == 4
