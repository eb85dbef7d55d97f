"""Flat buckets: parameters with equal properties share one flat tensor, so that each collective moves a large tensor.

    weights [padded]   | p0 | p1 | p2 ......... | pad |     param.data are views
    grads   [padded]   | g0 | g1 | g2 ......... | pad |     param.main_grad or param.grad are views
    zero rank:         |    0    |    1    |    2     |     each owns one shard; all shards have the same size

Buckets are ordered by when the backward pass completes them. From ZeRO stage 2 on the gradients, in stage 3 the
weights, too, have memory only while they are whole: their storage is resized, so that all views stay valid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    `param.main_grad`, to which its layer adds, or `param.grad`, to which autograd adds, a view of `grads`.

    `master` [shard_size]: fp32 or wider, the weights that this rank updates. A view of `weights` where these are as
    wide and always there; else a copy. `grad_shard` [shard_size]: after reduction the sum over all data-parallel ranks;
    from stage 2 on a tensor of its own, as wide as sums are, else a view of `grads`."""

    def __init__(
        self,
        kind: BucketSpec,
        params: Sequence[Parameter],
        zero: Group,
        grad_dtype: torch.dtype,
        loads: list[int] | None = None,
        stage: int = 1,
    ) -> None:
        """`loads`: of the rule's work on each rank of `zero`, by earlier buckets; adds to it. None: no rank needs whole
        parameters. `stage`: of ZeRO."""
        self.kind, self.stage = kind, stage
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
        self.grad_shard = self._part(self.grads)
        if stage > 1:
            self.grad_shard = torch.zeros(self.shard_size, dtype=_wide(grad_dtype), device=device)
            self.drop_grads()
        self.master = self.weight_shard.to(_wide(kind.dtype), copy=stage == 3)
        if stage == 3:
            self.drop_weights()

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

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole[self.shard_start : self.shard_start + self.shard_size]

    @property
    def weight_shard(self) -> torch.Tensor:
        """[shard_size] in `kind.dtype`: this rank's part of `weights`, a view, while there are weights."""
        return self._part(self.weights)

    @property
    def copies_master(self) -> bool:
        """Whether `master` is a copy: then weights are made of it, and change only when they are."""
        return self.stage == 3 or self.master.dtype != self.kind.dtype

    @property
    def has_grads(self) -> bool:
        """Whether `grads` has memory."""
        return self.grads.untyped_storage().nbytes() > 0

    def hold_grads(self) -> None:
        """Give `grads` memory, zeros, if it has none."""
        if not self.has_grads:
            _resize(self.grads, self.grads.nbytes)
            self.grads.zero_()

    def drop_grads(self) -> None:
        _resize(self.grads, 0)

    @property
    def has_weights(self) -> bool:
        """Whether `weights` has memory."""
        return self.weights.untyped_storage().nbytes() > 0

    def hold_weights(self) -> None:
        """Give `weights` memory, arbitrary numbers, if it has none."""
        if not self.has_weights:
            _resize(self.weights, self.weights.nbytes)

    def drop_weights(self) -> None:
        _resize(self.weights, 0)

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


def _wide(dtype: torch.dtype) -> torch.dtype:
    """In which numbers of `dtype` are updated and summed."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def _resize(flat: torch.Tensor, nbytes: int) -> None:
    """Give all of the memory under `flat` and its views back, or new memory to them. On CUDA that is in the order of
    the current stream: what it was given to before is done with it when later work there uses it."""
    flat.untyped_storage().resize_(nbytes)


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


def build_buckets(
    params: Sequence[Parameter], zero: Group, config: Config, unit_of: Mapping[Parameter, int] | None = None
) -> list[Bucket]:
    """Buckets of at most `reduce_bucket_size` elements (a larger parameter gets its own), in completion order.

    `params`: in forward order; the backward pass completes them in reverse. `unit_of`: the number of each one's unit;
    None will do in stage 1. From stage 2 on buckets do not cross units, so that a unit's can be freed when it is done:
    but in stage 2 those of rules that need whole parameters, whose shards would be as large as a unit's largest one.
    """
    bucket_size, stage = config.hybrid_zero_optimizer.reduce_bucket_size, config.parallel.zero_stage
    groups = ParamGroups(config)
    filled: list[tuple[BucketSpec, list[int]]] = []
    filling: dict[tuple[BucketSpec, int | None], list[int]] = {}
    for index in reversed(range(len(params))):
        param = params[index]
        spec = param.shard_spec
        kind = BucketSpec(param.dtype, groups.of(param), spec.tp_sharded, spec.partial_over)
        crosses = stage == 1 or (stage == 2 and RULES[kind.group.rule].whole_matrices)
        key = kind, None if crosses or unit_of is None else unit_of[param]
        indices = filling.get(key)
        if indices is None or sum(params[i].numel() for i in indices) + param.numel() > bucket_size:
            indices = filling[key] = []
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
        Bucket(kind, [params[i] for i in some], zero, _grad_dtype(kind.dtype, config), loads.get(kind.group), stage)
        for kind, some in filled
    ]


def _grad_dtype(weights: torch.dtype, config: Config) -> torch.dtype:
    """The dtype in which gradients of weights of this dtype are accumulated and reduced."""
    if weights.itemsize >= 4:
        return weights
    if config.hybrid_zero_optimizer.grad_dtype is not None:
        return torch_dtype(config.hybrid_zero_optimizer.grad_dtype)
    return torch.float32 if weights == torch.bfloat16 else weights
