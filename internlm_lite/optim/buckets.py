"""Flat buckets: parameters of one kind laid end to end, so that each collective moves one large tensor.

    weights [padded]   | p0 | p1 | p2 ......... | pad |     param.data are views
    grads   [padded]   | g0 | g1 | g2 ......... | pad |     param.grad are views, autograd accumulates into them
    zero rank:         |    0    |    1    |    2     |     each owns one equal shard

Buckets are kept in the order in which the backward pass completes them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Group
from internlm_lite.units import round_up

SHARD_ALIGNMENT = 256
"""Elements; keeps every shard on a 512-byte border in half precision, and lets norms be summed in rows of this size."""


@dataclass(frozen=True)
class Kind:
    """What parameters of one bucket have in common."""

    dtype: torch.dtype
    decay: bool
    spread: bool
    """True: tensor-parallel ranks hold different parts. False: they all hold the same."""
    summed: tuple[str, ...]
    """Axes besides dp over which gradients are partial sums, see `mesh.layout.Layout`."""


@dataclass(frozen=True)
class Slot:
    """Where a parameter lies in its bucket."""

    param: Parameter
    start: int
    stop: int


class Bucket:
    """Flat storage of some parameters. Building it moves their values into `weights`."""

    def __init__(self, kind: Kind, params: list[Parameter], zero: Group, grad_dtype: torch.dtype) -> None:
        self.kind = kind
        self.slots: list[Slot] = []
        offset = 0
        for param in params:
            self.slots.append(Slot(param, offset, offset + param.numel()))
            offset += param.numel()
        self.numel = offset
        padded = round_up(offset, zero.size * SHARD_ALIGNMENT)
        self.shard_size = padded // zero.size
        self.shard_start = self.shard_size * zero.rank
        device = params[0].device
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
        param.grad_dtype = self.grads.dtype
        param.grad = self.grads[slot.start : slot.stop].view(param.shape)

    @property
    def weight_shard(self) -> torch.Tensor:
        """[shard_size] in the model's dtype: this rank's part of `weights`."""
        return self.weights[self.shard_start : self.shard_start + self.shard_size]

    @property
    def grad_shard(self) -> torch.Tensor:
        """[shard_size]: this rank's part of `grads`; after reduction the sum over all data-parallel ranks."""
        return self.grads[self.shard_start : self.shard_start + self.shard_size]

    def owned(self) -> Iterable[tuple[Slot, int, int]]:
        """(slot, start, stop) for each parameter of which this rank owns elements start..stop of the bucket."""
        for slot in self.slots:
            start, stop = max(slot.start, self.shard_start), min(slot.stop, self.shard_start + self.shard_size)
            if start < stop:
                yield slot, start, stop

    def elements_on(self, zero_rank: int) -> int:
        """Elements of real parameters (no padding) in the shard of `zero_rank`."""
        return max(0, min(self.shard_size, self.numel - zero_rank * self.shard_size))


def build_buckets(
    params: list[Parameter], zero: Group, bucket_size: int, decay_all: bool, grad_dtype: torch.dtype | None
) -> list[Bucket]:
    """Buckets of at most `bucket_size` elements (a larger parameter gets its own), first-completed first.

    `params` in forward order; the backward pass completes them last to first. `grad_dtype` None: the parameter's own.
    """
    filled: list[tuple[Kind, list[int]]] = []
    filling: dict[Kind, list[int]] = {}
    for index in reversed(range(len(params))):
        param = params[index]
        kind = Kind(param.dtype, decay_all or param.dim() > 1, param.part.spread, param.part.summed)
        indices = filling.get(kind)
        if indices is None or sum(params[i].numel() for i in indices) + param.numel() > bucket_size:
            indices = filling[kind] = []
            filled.append((kind, indices))
        indices.append(index)
    filled.sort(key=lambda entry: -entry[1][-1])  # the parameter that is first in the forward pass completes a bucket
    return [
        Bucket(
            kind, [params[i] for i in indices], zero, grad_dtype if grad_dtype and _is_half(kind.dtype) else kind.dtype
        )
        for kind, indices in filled
    ]


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)
