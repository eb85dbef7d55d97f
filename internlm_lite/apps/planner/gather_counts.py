"""What ZeRO stages 2 and 3 gather and hold for a while in a step: drives the optimizer's own gatherer without ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.unit_gather import UnitGatherer


class _CountingGatherer(UnitGatherer):
    """Counts gathers instead of doing them."""

    counts: list[int]
    peak: int

    def _fetch(self, unit: int) -> None:
        for index in self._needs[unit]:
            if not self._buckets[index].has_weights:
                self._buckets[index].hold_weights()
                self.counts[index] += 1
        self.peak = max(self.peak, sum(bucket.weights.nbytes for bucket in self._buckets if bucket.has_weights))

    def step(self, micro_num: int, units: int) -> tuple[list[int], int]:
        """(gathers of each bucket, bytes of the weights there at the peak)"""
        self.counts, self.peak = [0] * len(self._buckets), 0
        self.begin(micro_num)
        with torch.enable_grad():
            for _ in range(micro_num):
                for unit in range(units):
                    self.before_forward(unit)
                    self.after_forward(unit)
                for unit in reversed(range(units)):
                    self.before_backward(unit)
                    self.after_backward(unit)
        self.free_all()
        return self.counts, self.peak


def planned_gathers(
    buckets: Sequence[Bucket], units: Sequence[nn.Module], mesh: Mesh, config: Config
) -> tuple[list[tuple[int, int]], int]:
    """(`BucketSizes.gathers` of each bucket, `RankHoldings.gathered`)"""
    parallel, zero = config.parallel, config.hybrid_zero_optimizer
    if parallel.zero_stage < 3:
        return [(1, 0)] * len(buckets), 0
    keep = mesh.pp.size > 1 or not parallel.reshard_after_forward
    gatherer = _CountingGatherer(buckets, units, mesh.zero, overlap=zero.overlap_sync_param, keep=keep)
    once, twice = (gatherer.step(micro_num, len(units)) for micro_num in (1, 2))
    gathers = [(2 * first - second, second - first) for first, second in zip(once[0], twice[0], strict=True)]
    return gathers, max(once[1], twice[1])


def whole_gradients(buckets: Sequence[BucketSizes]) -> int:
    """Bytes of whole gradients at the peak from stage 2 on: those of a unit, which its backward pass fills, and of the
    largest bucket behind it, which is being reduced, with the part of the sum that arrives."""
    later = [bucket for bucket in buckets if bucket.stage > 1]
    units = sorted({unit for bucket in later for unit in bucket.units})
    most = 0
    for unit in units:
        filled = sum(bucket.grads for bucket in later if unit in bucket.units)
        behind = [one.grads + one.arriving for one in later if min(one.units) > unit]
        most = max(most, filled + max(behind, default=0))
    return most
