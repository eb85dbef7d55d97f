"""Gradient reduction that overlaps with the backward pass.

A hook on each parameter counts the gradients that its bucket still misses; a complete bucket is reduce-scattered over
`zero`. At the end its shard is all-reduced over `replica`, and over `tp` or `ends` where ranks hold partial sums.
Buckets start strictly in order, so every rank issues the same collectives in the same order, whatever its timing.
"""

from __future__ import annotations

import functools

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket


class GradReducer:
    """Reduces the gradients of `buckets` once per optimizer step, during the last micro-batch's backward pass."""

    def __init__(self, buckets: list[Bucket], mesh: Mesh, *, overlap: bool) -> None:
        """Registers a hook on every parameter. `overlap` False: `finish` starts all collectives."""
        self._buckets = buckets
        self._mesh = mesh
        self._overlap = overlap
        self._missing: list[int] = []
        self._started: list[comm.Work] = []
        for index, bucket in enumerate(buckets):
            for slot in bucket.slots:
                slot.param.on_manual_grad = functools.partial(self._on_grad, index)
                if not slot.param.manual_grad:
                    slot.param.register_post_accumulate_grad_hook(slot.param.on_manual_grad)

    def expect(self, micro_num: int) -> None:
        """Call before the first backward pass of a step of `micro_num` micro-batches."""
        self._missing = [
            micro_num * sum(slot.param.grads_per_microbatch for slot in bucket.slots) for bucket in self._buckets
        ]
        self._started = []

    def _on_grad(self, index: int, param: Parameter) -> None:
        if not self._overlap:
            return
        self._missing[index] -= 1
        while len(self._started) < len(self._buckets) and self._missing[len(self._started)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[len(self._started)]
        self._started.append(comm.reduce_scatter(bucket.grad_shard, bucket.grads, self._mesh.zero))

    def finish(self) -> None:
        """Reduce the buckets that the backward pass did not complete (missing gradients are 0) and wait. Collective."""
        while len(self._started) < len(self._buckets):
            self._start_next()
        replicas = []
        for bucket, scattered in zip(self._buckets, self._started, strict=True):
            scattered.wait()
            replicas.append(comm.all_reduce(bucket.grad_shard, self._mesh.replica))
        for bucket, replicated in zip(self._buckets, replicas, strict=True):
            replicated.wait()
            for axis in bucket.kind.partial_over:
                comm.all_reduce(bucket.grad_shard, self._mesh.axis(axis)).wait()
