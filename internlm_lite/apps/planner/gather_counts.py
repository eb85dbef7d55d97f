"""What ZeRO stages 2 and 3 gather, and hold for a while: drives the optimizer's own exchanges without ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.head import Head
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.shard_reduce import Round, ShardReducer
from internlm_lite.optim.unit_gather import UnitGatherer
from internlm_lite.optim.unit_passes import UnitListener, parameters_read

STEPS = (1, 2, 3)
"""Micro-batches of the steps that are driven. The first one's sums need no room to arrive in, behind the last one
nothing is gathered for a next one: so there is one between them."""


class _CountingGatherer(UnitGatherer):
    """Counts gathers instead of doing them."""

    counts: list[int]
    held: set[int]
    """Buckets whose weights are there."""

    def _fetch(self, unit: int) -> None:
        for index in self._needs[unit]:
            if index not in self.held:
                self.held.add(index)
                self.counts[index] += 1

    def _free(self, unit: int) -> None:
        self.held.difference_update(self._needs[unit])

    def nbytes(self) -> int:
        return sum(self._buckets[index].weights.nbytes for index in self.held)


class _CountingReducer(ShardReducer):
    """Holds gradients and frees them, and sends nothing."""

    whole: set[int]
    """Buckets whose gradients are there."""

    def _hold(self, index: int) -> None:
        super()._hold(index)
        self.whole.add(index)

    def _scatter(self, part: torch.Tensor, bucket: Bucket) -> comm.Work:
        return comm.Work([], self._mesh.zero)

    def _replicate(self, bucket: Bucket) -> comm.Work:
        return comm.Work([], self._mesh.replica)

    def _end(self, one: Round) -> None:
        super()._end(one)
        self.whole.discard(one.bucket)

    def nbytes(self) -> int:
        """Also of the parts of sums that arrive beside the shards."""
        buckets = self._buckets
        arriving = [one.part.nbytes for one in self._rounds if one.part is not buckets[one.bucket].grad_shard]
        there = self.whole.union(one.bucket for one in self._rounds)
        return sum(buckets[index].grads.nbytes for index in there) + sum(arriving)


class _Step:
    """The passes of a step over `units`, by the calls that the real ones make."""

    def __init__(self, units: Sequence[nn.Module], gatherer: _CountingGatherer | None, reducer: _CountingReducer):
        self._units, self._gatherer, self._reducer = units, gatherer, reducer
        self._listeners: list[UnitListener] = [reducer] if gatherer is None else [gatherer, reducer]

    def run(self, micro_num: int) -> tuple[int, int]:
        """Bytes of whole weights and gradients at the peak: (in the loss, else)."""
        self._reducer.whole, in_loss, most = set(), 0, 0
        self._reducer.expect(micro_num)
        if self._gatherer is not None:
            self._gatherer.counts, self._gatherer.held = [0] * len(self._reducer._buckets), set()
            self._gatherer.begin(micro_num)
        with torch.enable_grad():
            for _ in range(micro_num):
                for unit in range(len(self._units)):
                    if isinstance(self._units[unit], Head):
                        in_loss = max(in_loss, *self._forward(unit))
                    else:
                        most = max(most, *self._forward(unit))
                for unit in reversed(range(len(self._units))):
                    most = max(most, *self._backward(unit))
        self._reducer.clear()
        return in_loss, most

    def _forward(self, unit: int) -> Iterator[int]:
        for one in self._listeners:
            one.before_forward(unit)
        module = self._units[unit]
        if isinstance(module, Head) and module.matrix.before_grad is not None:  # it adds its gradient now
            module.matrix.before_grad()
        yield self._nbytes()
        for one in self._listeners:
            one.after_forward(unit)
        yield self._nbytes()

    def _backward(self, unit: int) -> Iterator[int]:
        for one in self._listeners:
            one.before_backward(unit)
        yield self._nbytes()
        module = self._units[unit]
        for param in parameters_read(module):
            self._add(cast(Parameter, param))
        for one in self._listeners:
            one.after_backward(unit)
        yield self._nbytes()

    def _add(self, param: Parameter) -> None:
        """The gradient comes, unless the end of the unit's backward pass says so."""
        if param.deferred_grad and param.before_grad is not None:
            param.before_grad()
        if (param.deferred_grad or not param.manual_grad) and param.on_grad is not None:
            param.on_grad(param)

    def _nbytes(self) -> int:
        return self._reducer.nbytes() + (0 if self._gatherer is None else self._gatherer.nbytes())


def planned_gathers(
    buckets: list[Bucket], units: Sequence[nn.Module], firsts: Sequence[int], mesh: Mesh, config: Config
) -> tuple[list[tuple[int, int]], tuple[tuple[int, int], ...]]:
    """(`BucketSizes.gathers` of each bucket, `RankHoldings.wholes`). `firsts`: first unit of each pipeline stage."""
    parallel, zero = config.parallel, config.hybrid_zero_optimizer
    gathers = [(1, 0)] * len(buckets)
    if parallel.zero_stage == 1:
        return gathers, ((0, 0),)
    reducer, gatherer = _CountingReducer(buckets, units, mesh, firsts, overlap=zero.overlap_sync_grad), None
    if parallel.zero_stage == 3:
        keep = mesh.pp.size > 1 or not parallel.reshard_after_forward
        gatherer = _CountingGatherer(buckets, units, mesh.zero, overlap=zero.overlap_sync_param, keep=keep)
    step = _Step(units, gatherer, reducer)
    peaks, counts = [], []
    for micro_num in STEPS:
        peaks.append(step.run(micro_num))
        counts.append(gathers if gatherer is None else gatherer.counts)
    if gatherer is not None:
        gathers = [(2 * once - twice, twice - once) for once, twice in zip(*counts[:2], strict=True)]
    return gathers, tuple(peaks)
