"""Gradient reduction of ZeRO stages 2 and 3: a bucket's gradients are whole only while a micro-batch fills them.

    gradients of a micro-batch --reduce-scatter in zero--> part --added to--> shard      whole gradients are freed
    after the last one: shard --all-reduce in replica--> shard

A round is one reduction of one bucket. Each step has one for every micro-batch and bucket, whatever gradients there
are, and they start strictly in order, so every rank issues the same collectives in the same order; gradients that come
late are part of a later round. With several stages of a pipeline on a rank each stage has an order of its own: the
schedule, the same on all ranks of `zero`, says whose turn it is. The rounds of a unit end when those of the next one
start (small buckets do not count): the gradients of two units are whole, those reduced and those filled.
"""

from __future__ import annotations

import functools
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket

_SMALL = 0.01
"""Of the largest bucket: smaller ones do not make the rounds of other units end."""


@dataclass
class _Sequence:
    """The rounds of a pipeline stage: its buckets, in completion order, again and again."""

    buckets: list[int]
    started: int = 0


@dataclass
class Round:
    """A reduction in progress."""

    bucket: int
    micro: int
    work: comm.Work
    part: torch.Tensor
    """[shard_size]: where this rank's part of the sum arrives."""


@dataclass
class _UnitGrads:
    """Of a unit: what its backward pass adds before it ends."""

    added: list[int]
    """Of each parameter whose layer adds the gradient, the bucket."""
    buckets: list[int]
    """To which it adds."""
    ended: list[int]
    """Those of `buckets` to which nothing is added later: complete then, also where a parameter has no gradient."""
    passes: int = 0
    """Backward passes in this step."""


class ShardReducer:
    """Reduces the gradients of `buckets` once per micro-batch; a `unit_passes.UnitListener`."""

    def __init__(
        self,
        buckets: list[Bucket],
        units: Sequence[nn.Module],
        mesh: Mesh,
        first_units: Sequence[int],
        *,
        overlap: bool,
    ) -> None:
        """`first_units`: of each pipeline stage. `overlap` False: a round ends before the backward pass goes on."""
        self._buckets, self._mesh, self._overlap = buckets, mesh, overlap
        self._micro_num = 0
        self._arrived = [0] * len(buckets)
        self._rounds: list[Round] = []
        largest = max(bucket.grads.nbytes for bucket in buckets)
        self._is_small = [bucket.grads.nbytes < _SMALL * largest for bucket in buckets]
        self._replicated: dict[int, comm.Work] = {}
        bucket_of = {id(slot.param): index for index, bucket in enumerate(buckets) for slot in bucket.slots}
        self._per_micro = [sum(slot.param.grads_per_microbatch for slot in bucket.slots) for bucket in buckets]
        self._units = [self._grads_of(unit, bucket_of) for unit in units]
        unit_of = {id(param): number for number, unit in enumerate(units) for param in unit.parameters()}
        self._firsts = [min(unit_of[id(slot.param)] for slot in bucket.slots) for bucket in buckets]
        """The first unit of each bucket, in forward order, which completes it."""
        self._sequences = _sequences(self._firsts, first_units)
        self._sequence_of = {index: one for one in self._sequences for index in one.buckets}
        me = weakref.proxy(self)  # torch holds hooks where the garbage collector does not find a cycle
        for index, bucket in enumerate(buckets):
            for slot in bucket.slots:
                slot.param.before_grad = functools.partial(type(self)._hold, me, index)
                slot.param.on_grad = functools.partial(type(self)._on_grad, me, index)
                if not slot.param.manual_grad:
                    slot.param.register_post_accumulate_grad_hook(slot.param.on_grad)

    def _grads_of(self, unit: nn.Module, bucket_of: dict[int, int]) -> _UnitGrads:
        params = [cast(Parameter, param) for param in unit.parameters()]
        now = [param for param in params if not param.deferred_grad]
        added = [bucket_of[id(param)] for param in now if param.manual_grad]
        buckets = sorted({bucket_of[id(param)] for param in now})
        own = {id(param) for param in now}
        ended = [index for index in buckets if all(id(slot.param) in own for slot in self._buckets[index].slots)]
        return _UnitGrads(added, buckets, ended)

    def expect(self, micro_num: int) -> None:
        """Call before the first backward pass of a step of `micro_num` micro-batches."""
        self._micro_num, self._arrived, self._replicated = micro_num, [0] * len(self._buckets), {}
        for one in self._sequences:
            one.started = 0
        for unit in self._units:
            unit.passes = 0

    def before_forward(self, unit: int) -> None:
        if unit == len(self._units) - 1:  # a head fills its gradients in the forward pass: those of the last backward
            self._end_rounds()  # pass have had all the others to be reduced in

    def after_forward(self, unit: int) -> None:
        pass

    def before_backward(self, unit: int) -> None:
        for index in self._units[unit].buckets:
            self._hold(index)

    def after_backward(self, unit: int) -> None:
        grads = self._units[unit]
        grads.passes += 1
        for index in grads.added:
            self._arrived[index] += 1
        for index in grads.ended:
            self._arrived[index] = max(self._arrived[index], grads.passes * self._per_micro[index])
        for index in grads.buckets:
            self._start_complete(self._sequence_of[index])

    def _hold(self, index: int) -> None:
        """Let gradients be added to this bucket."""
        if any(one.bucket == index for one in self._rounds):
            self._end_rounds()
        self._buckets[index].hold_grads()

    def _on_grad(self, index: int, _param: Parameter) -> None:
        self._arrived[index] += 1
        self._start_complete(self._sequence_of[index])

    def _start_complete(self, one: _Sequence) -> None:
        """Start the rounds whose turn it is."""
        while one.started < self._micro_num * len(one.buckets) and self._is_complete(one):
            self._start_next(one)

    def _is_complete(self, one: _Sequence) -> bool:
        """Whether all gradients of the next round have come."""
        micro, place = divmod(one.started, len(one.buckets))
        index = one.buckets[place]
        return self._arrived[index] >= (micro + 1) * self._per_micro[index]

    def _start_next(self, one: _Sequence) -> None:
        micro, place = divmod(one.started, len(one.buckets))
        one.started += 1
        index = one.buckets[place]
        if any(self._is_in_the_way(before.bucket, index) for before in self._rounds):
            self._end_rounds()
        bucket = self._buckets[index]
        bucket.hold_grads()
        shard, dtype = bucket.grad_shard, bucket.grads.dtype
        part = shard if micro == 0 and shard.dtype == dtype else torch.empty_like(shard, dtype=dtype)
        self._rounds.append(Round(index, micro, self._scatter(part, bucket), part))
        if not self._overlap:
            self._end_rounds()

    def _is_in_the_way(self, before: int, index: int) -> bool:
        """Whether a round of bucket `before` has to end when one of bucket `index` starts."""
        return before == index or (not self._is_small[index] and self._firsts[before] != self._firsts[index])

    def _end_rounds(self) -> None:
        rounds, self._rounds = self._rounds, []
        for one in rounds:
            self._end(one)

    def _end(self, one: Round) -> None:
        """Add what arrived to the shard, and free the whole gradients."""
        one.work.wait()
        bucket = self._buckets[one.bucket]
        if one.part is not bucket.grad_shard:
            bucket.grad_shard.copy_(one.part) if one.micro == 0 else bucket.grad_shard.add_(one.part)
        bucket.drop_grads()
        if one.micro == self._micro_num - 1:
            self._replicated[one.bucket] = self._replicate(bucket)

    def _scatter(self, part: torch.Tensor, bucket: Bucket) -> comm.Work:
        return comm.reduce_scatter(part, bucket.grads, self._mesh.zero)

    def _replicate(self, bucket: Bucket) -> comm.Work:
        return comm.all_reduce(bucket.grad_shard, self._mesh.replica)

    def finish(self) -> None:
        """Do the rounds whose gradients did not come (they are 0) and wait. Collective."""
        for one in self._sequences:
            while one.started < self._micro_num * len(one.buckets):
                self._start_next(one)
        self._end_rounds()
        for index, bucket in enumerate(self._buckets):
            self._replicated[index].wait()
            for axis in bucket.kind.partial_over:
                comm.all_reduce(bucket.grad_shard, self._mesh.axis(axis)).wait()

    def clear(self) -> None:
        """Forget all gradients: after an update, or of a step that an exception ended."""
        self._end_rounds()
        for bucket in self._buckets:
            bucket.drop_grads()


def _sequences(first_bucket_units: Sequence[int], first_units: Sequence[int]) -> list[_Sequence]:
    """`first_bucket_units`: the first unit of each bucket."""
    stages: dict[int, list[int]] = {}
    for index, unit in enumerate(first_bucket_units):
        stages.setdefault(bisect_right(first_units, unit), []).append(index)
    return [_Sequence(buckets) for buckets in stages.values()]
