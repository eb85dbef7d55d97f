"""Gradient reduction that overlaps with the backward pass.

A bucket counts the gradients that it still misses; a complete one is reduce-scattered over `zero`. A gradient has come
when autograd has added it, when a deferred one was added, or when the backward pass has left the unit whose layers add
it. Its shard is then all-reduced over `replica`: on CUDA behind the reduce-scatter, on a stream of its own, so that
neither the backward pass nor the host waits; on the CPU at the end, because the host would wait. At the end it is also
all-reduced over `tp` or `ends` where ranks hold partial sums.
Buckets start strictly in order, so every rank issues the same collectives in the same order, whatever its timing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.unit_passes import BackwardReached


def _report_backward(params: Sequence[Parameter], _unit: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of a unit: when the gradient of its first input is there, those of `params` are, too."""
    if not torch.is_grad_enabled():
        return None
    assert inputs[0].requires_grad, "a unit whose layers add their gradients themselves comes after the embedding"

    def done() -> None:
        for param in params:
            assert param.on_grad is not None
            param.on_grad(param)

    return BackwardReached.apply(inputs[0], done), *inputs[1:]


class GradReducer:
    """Reduces the gradients of `buckets` once per optimizer step, during the last micro-batch's backward pass."""

    def __init__(self, buckets: list[Bucket], units: Sequence[nn.Module], mesh: Mesh, *, overlap: bool) -> None:
        """Registers hooks on parameters and `units`. `overlap` False: `finish` starts all collectives."""
        self._buckets = buckets
        self._mesh = mesh
        self._overlap = overlap
        self._missing: list[int] = []
        self._started: list[comm.Work] = []
        self._replicated: list[comm.Work] = []
        self._behind = comm.SideStream(mesh.device)
        for index, bucket in enumerate(buckets):
            for slot in bucket.slots:
                # A weak reference: torch holds hooks where the garbage collector does not find a cycle.
                slot.param.on_grad = functools.partial(GradReducer._on_grad, weakref.proxy(self), index)
                if not slot.param.manual_grad:
                    slot.param.register_post_accumulate_grad_hook(slot.param.on_grad)
        for unit in units:
            params = [cast(Parameter, param) for param in unit.parameters()]
            if added := [param for param in params if param.manual_grad and not param.deferred_grad]:
                unit.register_forward_pre_hook(functools.partial(_report_backward, added))

    def expect(self, micro_num: int) -> None:
        """Call before the first backward pass of a step of `micro_num` micro-batches."""
        self._missing = [
            micro_num * sum(slot.param.grads_per_microbatch for slot in bucket.slots) for bucket in self._buckets
        ]
        self._started, self._replicated = [], []

    def _on_grad(self, index: int, param: Parameter) -> None:
        if not self._overlap:
            return
        self._missing[index] -= 1
        while len(self._started) < len(self._buckets) and self._missing[len(self._started)] == 0:
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[len(self._started)]
        self._started.append(comm.reduce_scatter(bucket.grad_shard, bucket.grads, self._mesh.zero))
        if self._behind.is_real:
            self._replicate_next()

    def _replicate_next(self) -> None:
        index = len(self._replicated)
        with self._behind.current_work():
            self._started[index].wait()
            self._replicated.append(comm.all_reduce(self._buckets[index].grad_shard, self._mesh.replica))

    def finish(self) -> None:
        """Reduce the buckets that the backward pass did not complete (missing gradients are 0) and wait. Collective."""
        while len(self._started) < len(self._buckets):
            self._start_next()
        while len(self._replicated) < len(self._buckets):
            self._replicate_next()
        self._behind.join()
        for bucket, replicated in zip(self._buckets, self._replicated, strict=True):
            replicated.wait()
            for axis in bucket.kind.partial_over:
                comm.all_reduce(bucket.grad_shard, self._mesh.axis(axis)).wait()

    def clear(self) -> None:
        """Zero all gradients: after an update, or of a step that an exception ended."""
        torch._foreach_zero_([bucket.grads for bucket in self._buckets])
