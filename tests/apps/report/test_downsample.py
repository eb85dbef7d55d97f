"""Down-sampling keeps what stands out, whatever the curve."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from internlm_lite.apps.report.downsample import Buckets

CURVES = st.lists(st.one_of(st.just(float("nan")), st.floats(-1e9, 1e9)), min_size=1, max_size=400)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.array_equal(a, b, equal_nan=True))


def as_buckets(n: int, points: int) -> list[slice]:
    edges = np.linspace(0, n, points // 2 + 1).astype(int)
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


@given(CURVES, st.integers(2, 60))
def test_each_bucket_gives_its_smallest_and_largest_as_they_occurred(values: list[float], points: int) -> None:
    y = np.array(values)
    found = Buckets(len(y), points).extremes(y)
    if len(y) <= points:
        assert same(found, y)
        return
    buckets = as_buckets(len(y), points)
    assert len(found) == 2 * len(buckets) <= points
    for bucket, pair in zip(buckets, found.reshape(-1, 2), strict=True):
        there = y[bucket][~np.isnan(y[bucket])]
        if not len(there):
            assert np.isnan(pair).all()
            continue
        assert {pair.min(), pair.max()} == {there.min(), there.max()}
        first, second = (int(np.flatnonzero(there == value)[0]) for value in pair)
        assert first <= second


@given(CURVES, st.integers(2, 60))
def test_positions_are_first_and_last_of_each_bucket(values: list[float], points: int) -> None:
    x = np.arange(len(values)) * 3.0
    found = Buckets(len(x), points).positions(x)
    expected = x if len(x) <= points else np.array([[x[b][0], x[b][-1]] for b in as_buckets(len(x), points)]).ravel()
    assert same(found, expected)
    assert (np.diff(found) >= 0).all()


@given(st.integers(3, 5000), st.integers(2, 300), st.data())
def test_bucket_sizes_differ_by_one_and_a_spike_survives(n: int, points: int, data: st.DataObject) -> None:
    sizes = [bucket.stop - bucket.start for bucket in as_buckets(n, points)]
    assert n <= points or max(sizes) - min(sizes) <= 1
    spike = data.draw(st.integers(0, n - 1))
    y = np.zeros(n)
    y[spike] = 1.0
    assert Buckets(n, points).extremes(y).max() == 1.0


def test_none_and_one() -> None:
    for n in (0, 1):
        x = np.arange(n, dtype=float)
        assert same(Buckets(n, 1000).extremes(x), x)
        assert same(Buckets(n, 1000).positions(x), x)
