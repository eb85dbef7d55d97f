"""Gradient reduction that overlaps with the backward pass.

A bucket counts the gradients that it still misses; a complete one is reduce-scattered over `zero`. A gradient has come
when autograd has added it, when a deferred one was added, or when the backward pass has left the unit whose layers add
it. Its shard is all-reduced over `replica` as soon as it is scattered, while the backward pass goes on: on CUDA behind
the scatter on a stream of its own, on the CPU when a later gradient arrives. Partial sums over `tp` or `ends` are added
after the backward pass, which uses those groups itself. In every group buckets come strictly in order, so every rank
issues the same collectives in the same order, whatever its timing.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import Bucket


class _BackwardReached(torch.autograd.Function):
    """The identity; calls a function when the backward pass arrives."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: Callable[[], None]) -> torch.Tensor:
        ctx.call = call
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.call()
        return grads[0], None


def _report_backward(params: Sequence[Parameter], _unit: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A forward pre-hook of a unit: when the gradient of its first input is there, those of `params` are, too."""
    if not torch.is_grad_enabled():
        return None
    assert inputs[0].requires_grad, "a unit whose layers add their gradients themselves comes after the embedding"

    def done() -> None:
        for param in params:
            assert param.on_grad is not None
            param.on_grad(param)

    return _BackwardReached.apply(inputs[0], done), *inputs[1:]


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
        # Waits for scatters, so that the stream of the backward pass does not.
        self._side = torch.cuda.Stream(mesh.device) if mesh.device.type == "cuda" and mesh.replica.size > 1 else None
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
        self._advance()

    def _advance(self) -> None:
        while len(self._replicated) < len(self._started) and self._scattered():
            self._replicate_next()

    def _start_next(self) -> None:
        bucket = self._buckets[len(self._started)]
        self._started.append(comm.reduce_scatter(bucket.grad_shard, bucket.grads, self._mesh.zero))

    def _scattered(self) -> bool:
        """Whether `_replicate_next` would not block the host."""
        return self._side is not None or self._started[len(self._replicated)].completed()

    def _replicate_next(self) -> None:
        index = len(self._replicated)
        if self._mesh.replica.size == 1:  # then `finish` waits for the scatter
            self._replicated.append(self._started[index])
            return
        with torch.cuda.stream(self._side):
            self._started[index].wait()
            self._replicated.append(comm.all_reduce(self._buckets[index].grad_shard, self._mesh.replica))

    def finish(self) -> None:
        """Reduce the buckets that the backward pass did not complete (missing gradients are 0) and wait. Collective."""
        while len(self._started) < len(self._buckets):
            self._start_next()
        while len(self._replicated) < len(self._buckets):
            self._replicate_next()
        for bucket, replicated in zip(self._buckets, self._replicated, strict=True):
            replicated.wait()
            for axis in bucket.kind.partial_over:
                comm.all_reduce(bucket.grad_shard, self._mesh.axis(axis)).wait()
