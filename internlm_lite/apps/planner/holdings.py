"""What the ranks hold: the real stages on the meta device, laid into the real buckets of the optimizer.

Nothing is allocated and nothing is assumed: parameters, padding and bytes are those of the tensors the trainer makes.
Ranks that differ only in tp, zero or replica hold the same amounts, so one rank of each pipeline position is built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch

from internlm_lite.config.schema import Config
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Sizes, plan_mesh, rank_of
from internlm_lite.models.stages import Stages, build_stages, units_of
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.rules import RULES


@dataclass(frozen=True)
class BucketSizes:
    """Bytes of one bucket on one rank, padding included."""

    weights: int
    grads: int
    shard_grads: int
    """The part of `grads` that this rank optimizes."""
    masters: int
    """fp32 copy of the shard's weights; 0 where the weights are their own masters."""
    moments: int
    """State of the update rule."""
    update_grads: int
    """fp32 copy of the shard's gradient that the update rule reads; lives only during the update."""
    partial_over: tuple[str, ...]
    """Axes over which the shard's gradient is summed besides dp."""


@dataclass(frozen=True)
class RankHoldings:
    """What every rank of one pipeline position holds."""

    pp: int
    stages: Stages
    """On the meta device."""
    parameters: int
    """Elements of the rank's parameters, without padding."""
    zero_elements: tuple[int, ...]
    """Elements of parameters that each rank of `zero` optimizes, without padding."""
    buckets: tuple[BucketSizes, ...]
    """In the order in which the backward pass completes them."""

    @property
    def weights(self) -> int:
        return sum(bucket.weights for bucket in self.buckets)

    @property
    def gradients(self) -> int:
        return sum(bucket.grads for bucket in self.buckets)

    @property
    def optimizer(self) -> int:
        """Master weights of the shard and what the update rule keeps."""
        return sum(bucket.masters + bucket.moments for bucket in self.buckets)

    @property
    def update(self) -> int:
        return sum(bucket.update_grads for bucket in self.buckets)


def holdings(config: Config, sizes: Sizes, backend: AttentionBackend) -> tuple[list[RankHoldings], int]:
    """(what each pipeline position holds, parameters of the whole model).

    Raises ConfigError where building the model would.
    """
    wholes: dict[str, int] = {}  # by name: a tied weight with two copies is one
    held = []
    for pp in range(sizes.pp):
        mesh = plan_mesh(sizes, rank_of(sizes, dp=0, tp=0, pp=pp), torch.device("meta"))
        stages = build_stages(config, mesh, backend)
        params = [cast(Parameter, param) for unit in units_of(stages) for param in unit.parameters()]
        wholes.update({param.shard_spec.name: math.prod(param.shard_spec.shape) for param in params})
        buckets = build_buckets(params, mesh.zero, config)
        held.append(
            RankHoldings(
                pp=pp,
                stages=stages,
                parameters=sum(bucket.numel for bucket in buckets),
                zero_elements=tuple(sum(b.elements_on(rank) for b in buckets) for rank in range(sizes.zero)),
                buckets=tuple(_sizes(bucket, len(RULES[config.optimizer.name].roles)) for bucket in buckets),
            )
        )
    return held, sum(wholes.values())


def _sizes(bucket: Bucket, state_tensors: int) -> BucketSizes:
    shard, dtype = bucket.shard_size, bucket.kind.dtype
    exact = max(4, dtype.itemsize)  # updates are computed in fp32, or in the weights' own dtype if that is wider
    half = dtype.itemsize < 4
    return BucketSizes(
        weights=bucket.weights.nbytes,
        grads=bucket.grads.nbytes,
        shard_grads=bucket.grad_shard.nbytes,
        masters=shard * exact if half else 0,
        moments=state_tensors * shard * exact,
        update_grads=shard * exact if bucket.grads.dtype.itemsize < exact else 0,
        partial_over=bucket.kind.partial_over,
    )
