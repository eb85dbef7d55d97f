"""Bytes of the optimizer's buckets, and what a step sends of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BucketSizes:
    """Bytes of one bucket on one rank, padding included."""

    weights: int
    grads: int
    shard_grads: int
    """Bytes of the part of `grads` that this rank optimizes."""
    masters: int
    """fp32 copy of the shard's weights; 0 where the weights are their own masters."""
    moments: int
    """State of the update rule."""
    expanded: int
    """fp32 copy of a state in bf16; one bucket at a time has it, during the update. 0 without bf16."""
    update_grads: int
    """fp32 copy of the shard's gradient that the update rule reads; lives only during the update."""
    partial_over: tuple[str, ...]
    """Axes over which the shard's gradient is summed besides dp."""
    shard_weights: int
    """Bytes of the part of `weights` that this rank optimizes."""
    units: tuple[int, ...]
    """Units of the rank's stages, in forward order, with parameters in this bucket."""
    product_flops: tuple[int, ...]
    """Of matrix products in the update on each rank of `zero`, by all of its tensor-parallel ranks together."""
    exchanged: int
    """Bytes of what an update collects over `tp`, and again hands out."""
    update_workspace: int
    """Estimate of what the update of this bucket allocates besides."""
    averages: int = 0
    """Average of the shard's weights (EMA)."""
    averages_moved: int = 0
    """Bytes that its update reads and writes, per step: once in `ema.every` steps it reads it and the masters."""
    stage: int = 1
    """Of ZeRO: from 2 on `grads`, in 3 `weights`, too, are there only while they are whole."""
    gathers: tuple[int, int] = (1, 0)
    """All-gathers of the weights in a step: some, and more for each micro-batch."""

    def reductions(self, micro_num: int) -> int:
        """Reduce-scatters of the gradients in a step."""
        return 1 if self.stage == 1 else micro_num

    def gathered(self, micro_num: int) -> int:
        """All-gathers of the weights in a step."""
        return self.gathers[0] + self.gathers[1] * micro_num

    @property
    def update_traffic(self) -> int:
        """Bytes that the update reads and writes: gradient in the dtype of the masters, masters, state; a fp32 copy of
        that is made, read, written and rounded."""
        exact = self.update_grads or self.shard_grads
        return 2 * (self.masters or exact) + 2 * self.moments + 4 * self.expanded + exact
