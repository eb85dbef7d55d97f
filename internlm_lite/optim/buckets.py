"""Flat buckets: parameters with equal properties share one flat tensor, so that each collective moves a large tensor.

    weights [padded]   | p0 | p1 | p2 ......... | pad |     param.data are views
    grads   [padded]   | g0 | g1 | g2 ......... | pad |     param.main_grad or param.grad are views
    zero rank:         |    0    |    1    |    2     |     each owns one shard; all shards have the same size

Buckets are ordered by when the backward pass completes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from internlm_lite.config.schema import Config
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Group
from internlm_lite.optim.groups import ParamGroup, ParamGroups
from internlm_lite.optim.rules import RULES
from internlm_lite.runtime.device import torch_dtype
from internlm_lite.units import round_up

SHARD_ALIGNMENT = 256
"""Elements; shards start at multiples of it (512 bytes in half precision), and norms are summed in rows of it."""


@dataclass(frozen=True)
class BucketSpec:
    """Properties that all parameters of a bucket share."""

    dtype: torch.dtype
    group: ParamGroup
    tp_sharded: bool
    """See `mesh.layout.ShardSpec`."""
    partial_over: tuple[str, ...]
    """Axes besides dp over which gradients are partial sums; see `mesh.layout.ShardSpec`."""


@dataclass(frozen=True)
class Slot:
    """Elements start..stop of a bucket belong to `param`."""

    param: Parameter
    start: int
    stop: int


class Bucket:
    """Flat storage of parameters. Construction copies their values and makes `param.data` a view of `weights`, and
    `param.main_grad`, to which its layer adds, or `param.grad`, to which autograd adds, a view of `grads`."""

    def __init__(
        self,
        kind: BucketSpec,
        params: Sequence[Parameter],
        zero: Group,
        grad_dtype: torch.dtype,
        loads: list[int] | None = None,
    ) -> None:
        """`loads`: of the rule's work on each rank of `zero`, by earlier buckets; adds to it. None: no rank needs whole
        parameters."""
        self.kind = kind
        numels = [param.numel() for param in params]
        self.numel = sum(numels)
        if loads is None:
            starts, self.shard_size = _end_to_end(numels, zero.size)
        else:
            rule = RULES[kind.group.rule]
            costs = [rule.product_flops(param, kind.group) or param.numel() for param in params]
            starts, self.shard_size = _parameters_whole(numels, costs, loads)
        self.slots = [Slot(param, start, start + param.numel()) for param, start in zip(params, starts, strict=True)]
        self.shard_start = self.shard_size * zero.rank
        padded, device = self.shard_size * zero.size, params[0].device
        self.weights = torch.zeros(padded, dtype=kind.dtype, device=device)
        self.grads = torch.zeros(padded, dtype=grad_dtype, device=device)
        for slot in self.slots:
            self._adopt(slot)

    def _adopt(self, slot: Slot) -> None:
        param = slot.param
        with torch.no_grad():
            weight = self.weights[slot.start : slot.stop].view(param.shape)
            weight.copy_(param)
            param.data = weight
        grad = self.grads[slot.start : slot.stop].view(param.shape)
        if param.manual_grad:
            param.main_grad = grad
        else:
            param.grad_dtype = grad.dtype
            param.grad = grad

    @property
    def weight_shard(self) -> torch.Tensor:
        """[shard_size] in `kind.dtype`: this rank's part of `weights`, a view."""
        return self.weights[self.shard_start : self.shard_start + self.shard_size]

    @property
    def grad_shard(self) -> torch.Tensor:
        """[shard_size]: this rank's part of `grads`, a view; after reduction the sum over all data-parallel ranks."""
        return self.grads[self.shard_start : self.shard_start + self.shard_size]

    def owned(self) -> Iterator[tuple[Slot, int, int]]:
        """(slot, start, stop) for each parameter in this rank's shard: its elements there are start..stop-1 of the
        bucket."""
        return self._in_shard(self.shard_start)

    def elements_on(self, zero_rank: int) -> int:
        """Elements in the shard of `zero_rank`, without padding."""
        return sum(stop - start for _, start, stop in self._in_shard(zero_rank * self.shard_size))

    def _in_shard(self, shard_start: int) -> Iterator[tuple[Slot, int, int]]:
        for slot in self.slots:
            start, stop = max(slot.start, shard_start), min(slot.stop, shard_start + self.shard_size)
            if start < stop:
                yield slot, start, stop


def _end_to_end(numels: Sequence[int], zero_size: int) -> tuple[list[int], int]:
    """(start of each parameter, elements per shard), without gaps: less than one alignment of padding per shard."""
    *starts, total = accumulate(numels, initial=0)
    return starts, round_up(total, zero_size * SHARD_ALIGNMENT) // zero_size


def _parameters_whole(numels: Sequence[int], costs: Sequence[int], loads: list[int]) -> tuple[list[int], int]:
    """As `_end_to_end`, but each parameter lies in one shard: the most expensive first, into the shard of the rank with
    the least work so far (`loads`, to which it is added), among those that it does not make larger than need be.

    Every shard is padded to the size of the largest.
    """
    limit = _largest_part(numels, len(loads))
    filled = [0] * len(loads)
    places = {}
    for index in sorted(range(len(numels)), key=lambda i: -costs[i]):
        fits = [rank for rank, n in enumerate(filled) if n + numels[index] <= limit]
        rank = min(fits, key=loads.__getitem__) if fits else filled.index(min(filled))
        places[index] = rank, filled[rank]
        filled[rank] += numels[index]
        loads[rank] += costs[index]
    shard_size = round_up(max(filled), SHARD_ALIGNMENT)
    return [rank * shard_size + offset for _, (rank, offset) in sorted(places.items())], shard_size


def _largest_part(numels: Sequence[int], parts: int) -> int:
    """Elements of the largest of `parts` parts, if each takes the largest parameter left when it has the fewest."""
    filled = [0] * parts
    for numel in sorted(numels, reverse=True):
        filled[filled.index(min(filled))] += numel
    return max(filled)


def build_buckets(params: Sequence[Parameter], zero: Group, config: Config) -> list[Bucket]:
    """Buckets of at most `reduce_bucket_size` elements (a larger parameter gets its own), in completion order.

    `params`: in forward order; the backward pass completes them in reverse.
    """
    bucket_size = config.hybrid_zero_optimizer.reduce_bucket_size
    groups = ParamGroups(config)
    filled: list[tuple[BucketSpec, list[int]]] = []
    filling: dict[BucketSpec, list[int]] = {}
    for index in reversed(range(len(params))):
        param = params[index]
        spec = param.shard_spec
        kind = BucketSpec(param.dtype, groups.of(param), spec.tp_sharded, spec.partial_over)
        indices = filling.get(kind)
        if indices is None or sum(params[i].numel() for i in indices) + param.numel() > bucket_size:
            indices = filling[kind] = []
            filled.append((kind, indices))
        indices.append(index)
    # Buckets of different kinds fill at the same time. A bucket is complete when its first parameter in forward order,
    # which has its last index, has its gradient. Sort by that: the reducer starts buckets strictly in order, and would
    # otherwise wait for a bucket that was begun early and completes late.
    filled.sort(key=lambda entry: -entry[1][-1])
    loads: dict[ParamGroup, list[int]] = {
        kind.group: [0] * zero.size for kind, _ in filled if RULES[kind.group.rule].whole_matrices
    }
    return [
        Bucket(kind, [params[i] for i in indices], zero, _grad_dtype(kind.dtype, config), loads.get(kind.group))
        for kind, indices in filled
    ]


def _grad_dtype(weights: torch.dtype, config: Config) -> torch.dtype:
    """The dtype in which gradients of weights of this dtype are accumulated and reduced."""
    if weights.itemsize >= 4:
        return weights
    if config.hybrid_zero_optimizer.grad_dtype is not None:
        return torch_dtype(config.hybrid_zero_optimizer.grad_dtype)
    return torch.float32 if weights == torch.bfloat16 else weights
