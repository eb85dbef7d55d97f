"""The cost of an average of the weights is measured on steps that update one. No test asserts a time."""

from __future__ import annotations

from internlm_lite.apps.bench.averages import bench_averages
from tests.apps.bench.test_bench import CPU, SHAPE


def test_both_measures_are_of_the_same_step() -> None:
    found = bench_averages(CPU, rounds=2, **SHAPE)
    assert found.ratio == found.averaging_seconds / found.plain_seconds > 0
    assert found.share == found.update_work / found.plain_work > 0
    assert found.tokens == 64 and found.parameters > 1000
