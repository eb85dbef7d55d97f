"""Batch order and mixing: pure functions of the position."""

from collections import Counter

import numpy as np
import pytest

from internlm_lite.batch import Position
from internlm_lite.config.ranges import Rampup
from internlm_lite.data.mix import EpochMix, WeightedMix, build_mix
from internlm_lite.data.order import BatchOrder
from internlm_lite.errors import DataError


def _walk(order: BatchOrder, steps: int, position: Position = Position()) -> list[tuple[range, Position]]:
    found = []
    for _ in range(steps):
        rows, position = order.take(position)
        found.append((rows, position))
    return found


def test_rank_takes_every_dp_th_row():
    order = BatchOrder(micro_num=3, dp_size=4)
    rows, after = order.take(Position(2, 24))
    assert (rows, after) == (range(24, 36), Position(3, 36))
    assert [list(order.share(rows, rank)) for rank in (0, 3)] == [[24, 28, 32], [27, 31, 35]]


@pytest.mark.parametrize("dp", [1, 2, 4])
def test_same_product_same_global_batches(dp):
    batches = [rows for rows, _ in _walk(BatchOrder(8 // dp, dp), 5)]
    assert batches == [range(8 * i, 8 * i + 8) for i in range(5)]


def test_skipped_batches_are_consumed_and_dropped():
    found = _walk(BatchOrder(2, 2, skip=(range(1, 4), range(5, 6))), 3)
    assert found == [
        (range(0, 4), Position(1, 4)),
        (range(16, 20), Position(5, 20)),
        (range(24, 28), Position(7, 28)),
    ]


@pytest.mark.parametrize(
    ("rampup", "full", "expected"),
    [(Rampup(1, 1, 4), 4, [1, 1, 1, 1, 2, 2, 2, 2, 3]), (Rampup(2, 2, 2), 8, [2, 2, 4, 4, 6, 6, 8, 8, 8])],
)
def test_rampup(rampup, full, expected):
    found = _walk(BatchOrder(full, 2, rampup=rampup), 9)
    assert [len(rows) // 2 for rows, _ in found] == expected
    assert [rows.start for rows, _ in found] == [2 * sum(expected[:i]) for i in range(9)]


def test_a_position_is_all_it_takes_to_go_on():
    order = BatchOrder(4, 2, skip=(range(3, 6),), rampup=Rampup(1, 1, 2))
    whole = _walk(order, 12)
    for i in range(1, 12):
        assert _walk(order, 12 - i, whole[i - 1][1]) == whole[i:]


def test_an_epoch_holds_every_row_once_and_the_next_is_shuffled_anew():
    mix = EpochMix([5, 0, 8], seed=1, batch_rows=4)  # 13 rows, the tail of 1 is dropped
    epochs = [mix.rows_of_folders(range(12 * e, 12 * e + 12)) for e in range(3)]
    for places in epochs:
        assert len(set(places)) == 12
        assert all(row < (5, 0, 8)[folder] for folder, row in places)
    assert epochs[0] != epochs[1] != epochs[2]
    assert mix.rows_of_folders(range(10, 15)) == [*epochs[0][10:], *epochs[1][:3]]


def test_weighted_shares_and_wrapping():
    counts, weights = [3, 50, 700], [5.0, 3.0, 0.004]
    mix = WeightedMix(counts, weights, seed=7)
    n = 20_000
    places = mix.rows_of_folders(range(n))
    seen = Counter(folder for folder, _ in places)
    assert sum(seen.values()) == n
    for folder, weight in enumerate(weights):
        assert abs(seen[folder] - n * weight / sum(weights)) < 5  # whole blocks: 1; the open block: a little more
        rows = [row for f, row in places if f == folder]
        for start in range(0, len(rows) - counts[folder] + 1, counts[folder]):
            assert sorted(rows[start : start + counts[folder]]) == list(range(counts[folder]))
    assert places[12_345:12_400] == WeightedMix(counts, weights, seed=7).rows_of_folders(range(12_345, 12_400))
    assert places[:1024] != WeightedMix(counts, weights, seed=8).rows_of_folders(range(1024))


@pytest.mark.parametrize("seed", range(20))
def test_weighted_quotas_never_go_back(seed):
    weights = np.random.RandomState(seed).lognormal(sigma=4, size=6).tolist()
    mix = WeightedMix([10] * 6, weights, seed)
    for block in range(30):
        before, after = mix._taken(block), mix._taken(block + 1)
        assert (after >= before).all() and before.sum() == block * mix._block_rows
        assert np.abs(before - block * mix._block_rows * np.array(weights) / sum(weights)).max() < 1.01


def test_mix_refuses_what_cannot_work():
    with pytest.raises(DataError, match=r"fill 7 rows .* expected at least 8"):
        build_mix({"a": 3, "b": 4}, None, 0, batch_rows=8)
    with pytest.raises(
        DataError, match=r"'cod' is no folder with data, did you mean 'code'.; folder 'code' has no weight"
    ):
        build_mix({"code": 9, "docs": 9}, {"cod": 1.0, "docs": 1.0}, 0, batch_rows=8)
