"""Weights of ZeRO stage 3: gathered of a unit before its forward pass and before its backward pass, freed after them.

    master shards --copied to this rank's part--> all-gather in zero --> pass of the unit --> freed

While a unit computes, the weights of the next one are on their way: in the forward pass the one behind it, in the
backward pass the one before it. So two units have weights at a time. (Small ones, norms, go along with the next and
stay until the step ends.) NCCL has a stream of its own, so the copy of a part is all that the gather takes of this one.
With `keep` weights stay from the first forward pass of a step to the last backward pass, so they are gathered once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.unit_passes import parameters_read

_SMALL = 0.01
"""Of the largest unit's weights: smaller units do not count as one."""


class UnitGatherer:
    """Gives the units their weights; a `unit_passes.UnitListener`. A forward pass without gradients gathers, too, so
    all ranks of `zero` must do the same number of them."""

    def __init__(
        self, buckets: Sequence[Bucket], units: Sequence[nn.Module], zero: Group, *, overlap: bool, keep: bool
    ) -> None:
        """`overlap` False: nothing is gathered ahead."""
        self._buckets, self._zero, self._overlap, self._keep = buckets, zero, overlap, keep
        self._sources = [bucket.master for bucket in buckets]
        self._gathers: list[comm.Work | None] = [None] * len(buckets)
        self._bucket_of = {id(slot.param): index for index, bucket in enumerate(buckets) for slot in bucket.slots}
        self._needs = [_buckets_of(parameters_read(unit), self._bucket_of) for unit in units]
        sizes = [sum(buckets[index].weights.nbytes for index in needs) for needs in self._needs]
        self._is_small = [size < _SMALL * max(sizes) for size in sizes]
        self._in_backward = [bool(getattr(unit, "weights_in_backward", True)) for unit in units]
        self._micro_num = 1
        self._uses_left = [0] * len(units)
        """Passes with gradients until a unit's weights are not needed any more in this step."""

    def begin(self, micro_num: int) -> None:
        """Call before the first forward pass of a step of `micro_num` micro-batches."""
        self._micro_num = micro_num
        self._uses_left = [micro_num] * len(self._needs)

    def before_forward(self, unit: int) -> None:
        self._hold(unit)
        self._gather_ahead(self._after_in_forward(unit))

    def after_forward(self, unit: int) -> None:
        if not torch.is_grad_enabled():
            self._free(unit)
        elif not self._in_backward[unit]:
            self._use(unit)
        elif not self._keep and not self._is_small[unit]:
            self._free(unit)

    def before_backward(self, unit: int) -> None:
        if self._in_backward[unit]:
            self._hold(unit)
            self._gather_ahead(self._after_in_backward(unit))

    def after_backward(self, unit: int) -> None:
        if self._in_backward[unit]:
            self._use(unit)

    def _use(self, unit: int) -> None:
        self._uses_left[unit] -= 1
        if self._uses_left[unit] <= 0 or not (self._keep or self._is_small[unit]):
            self._free(unit)

    def _after_in_forward(self, unit: int) -> Iterator[int]:
        yield from range(unit + 1, len(self._needs))
        if torch.is_grad_enabled():
            yield from self._after_in_backward(len(self._needs))

    def _after_in_backward(self, unit: int) -> Iterator[int]:
        yield from (number for number in reversed(range(unit)) if self._in_backward[number])
        if self._uses_left[0] > 0:  # another micro-batch
            yield from range(len(self._needs))

    def _gather_ahead(self, following: Iterable[int]) -> None:
        """Start to gather the next unit, and small ones before it."""
        for unit in following if self._overlap else ():
            self._fetch(unit)
            if not self._is_small[unit]:
                return

    def _hold(self, unit: int) -> None:
        self._fetch(unit)
        for index in self._needs[unit]:
            self._wait(index)

    def _fetch(self, unit: int) -> None:
        for index in self._needs[unit]:
            bucket = self._buckets[index]
            if not bucket.has_weights:
                bucket.hold_weights()
                with torch.no_grad():
                    bucket.weight_shard.copy_(self._sources[index])
                self._gathers[index] = comm.all_gather(bucket.weights, self._zero)

    def _wait(self, index: int) -> None:
        work, self._gathers[index] = self._gathers[index], None
        if work is not None:
            work.wait()

    def _free(self, unit: int) -> None:
        for index in self._needs[unit]:
            self._wait(index)
            self._buckets[index].drop_weights()

    def free_all(self) -> None:
        """Free what is still there: at the end of a step, and before weights change."""
        for unit in range(len(self._needs)):
            self._free(unit)

    def start(self, sources: Sequence[torch.Tensor]) -> None:
        """Gather from these tensors, one for each bucket, from now on."""
        self.free_all()
        self._sources = list(sources)

    def wait(self) -> None:
        """Nothing to wait for: a unit waits for its weights itself."""

    @contextmanager
    def allocated(self, unit: nn.Module) -> Iterator[list[Bucket]]:
        """The buckets of a unit's own parameters: their weights have memory while it lasts, zeros. Not collective."""
        own = [self._buckets[index] for index in _buckets_of(unit.parameters(), self._bucket_of)]
        for bucket in own:
            bucket.hold_weights()
            bucket.weights.zero_()  # what is between parameters becomes part of the master weights
        yield own
        for bucket in own:
            bucket.drop_weights()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """While it lasts, all weights are there. Collective."""
        self.free_all()
        for unit in range(len(self._needs)):
            self._hold(unit)
        try:
            yield
        finally:
            self.free_all()


def _buckets_of(params: Iterable[nn.Parameter], bucket_of: dict[int, int]) -> list[int]:
    return sorted({bucket_of[id(param)] for param in params})
