"""All-gather of weights, overlapped with the next forward pass: each unit waits for its own weights before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group
from internlm_lite.optim.buckets import Bucket
from internlm_lite.optim.unit_passes import parameters_read


class WeightGatherer:
    """All-gathers the updated shards of `buckets` over `zero`."""

    def __init__(self, buckets: Sequence[Bucket], units: Sequence[nn.Module], zero: Group, *, overlap: bool) -> None:
        """Registers a forward pre-hook on each of `units`. `overlap` False: `start` waits for all gathers."""
        self._buckets = buckets
        self._zero = zero
        self._overlap = overlap
        self._gathers: list[comm.Work | None] = [None] * len(buckets)
        bucket_of = {id(slot.param): index for index, bucket in enumerate(buckets) for slot in bucket.slots}
        for unit in units:
            indices = sorted({bucket_of[id(param)] for param in parameters_read(unit)})
            unit.register_forward_pre_hook(lambda _module, _args, needed=indices: self._wait(needed))

    def begin(self, micro_num: int) -> None:
        """Weights stay whole, whatever a step has of micro-batches."""

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are there once `wait` has returned."""
        yield

    def start(self, masters: Sequence[torch.Tensor]) -> None:
        """Copy this rank's master weights (one shard per bucket) into the weights and start all-gathers. Collective."""
        # In reverse, because buckets are in backward order and the forward pass needs the last ones first.
        for index in reversed(range(len(self._buckets))):
            bucket, master = self._buckets[index], masters[index]
            if bucket.copies_master:
                bucket.weight_shard.copy_(master)
            self._gathers[index] = comm.all_gather(bucket.weights, self._zero)
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Wait for all gathers: then all weights are current."""
        self._wait(range(len(self._buckets)))

    def _wait(self, indices: Iterable[int]) -> None:
        for index in indices:
            work, self._gathers[index] = self._gathers[index], None
            if work is not None:
                work.wait()
