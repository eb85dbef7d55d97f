"""Weights are gathered while the next forward pass starts: each unit waits for its own right before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Group
from internlm_lite.optim.buckets import Bucket


class WeightGatherer:
    """All-gathers the updated shards of `buckets` over `zero`."""

    def __init__(self, buckets: Sequence[Bucket], units: Sequence[nn.Module], zero: Group, *, overlap: bool) -> None:
        """`overlap` False: `start` waits for everything."""
        self._buckets = buckets
        self._zero = zero
        self._overlap = overlap
        self._gathers: list[comm.Work | None] = [None] * len(buckets)
        bucket_of = {id(slot.param): index for index, bucket in enumerate(buckets) for slot in bucket.slots}
        for unit in units:
            indices = sorted({bucket_of[id(param)] for param in unit.parameters()})
            unit.register_forward_pre_hook(lambda _module, _args, needed=indices: self._wait(needed))

    def start(self, masters: Sequence[torch.Tensor]) -> None:
        """Copy the master weights of this rank into its shards of the weights, and gather those of the others."""
        # Buckets are in the order of the backward pass; reversed, those that the forward pass needs first come first.
        for index in reversed(range(len(self._buckets))):
            bucket, master = self._buckets[index], masters[index]
            if master.dtype != bucket.kind.dtype:  # otherwise it is a view of the weights
                bucket.weight_shard.copy_(master)
            self._gathers[index] = comm.all_gather(bucket.weights, self._zero)
        if not self._overlap:
            self.wait()

    def wait(self) -> None:
        """Make all weights current."""
        self._wait(range(len(self._buckets)))

    def _wait(self, indices: Iterable[int]) -> None:
        for index in indices:
            work, self._gathers[index] = self._gathers[index], None
            if work is not None:
                work.wait()
