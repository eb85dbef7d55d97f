"""What the ranks hold: the stages are built on the meta device and assigned to the optimizer's buckets.

Nothing is allocated; parameters, padding and bytes are exactly those of the trainer's tensors.
Ranks that differ only in tp, zero or replica hold the same amounts, so one rank of each pipeline position is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from internlm_lite.config.schema import Config, EmaConfig
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

    @property
    def update_traffic(self) -> int:
        """Bytes that the update reads and writes: gradient in the dtype of the masters, masters, state; a fp32 copy of
        that is made, read, written and rounded."""
        exact = self.update_grads or self.shard_grads
        return 2 * (self.masters or exact) + 2 * self.moments + 4 * self.expanded + exact


@dataclass(frozen=True)
class RankHoldings:
    """Parameters and buckets of every rank of one pipeline position."""

    pp: int
    stages: Stages
    """The stages, on the meta device."""
    parameters: int
    """Elements of the rank's parameters, without padding."""
    zero_elements: tuple[int, ...]
    """Elements of parameters that each rank of `zero` optimizes, without padding."""
    buckets: tuple[BucketSizes, ...]
    """Buckets, in the order in which the backward pass completes them."""

    @property
    def weights(self) -> int:
        return sum(bucket.weights for bucket in self.buckets)

    @property
    def gradients(self) -> int:
        return sum(bucket.grads for bucket in self.buckets)

    @property
    def optimizer(self) -> int:
        """Bytes of the shard's master weights, of the update rule's state, and of the average."""
        return sum(bucket.masters + bucket.moments + bucket.averages for bucket in self.buckets)

    @property
    def update(self) -> int:
        workspace = max(one.expanded + one.update_workspace for one in self.buckets)  # one bucket after the other
        return sum(one.update_grads for one in self.buckets) + workspace


def holdings(config: Config, sizes: Sizes, backend: AttentionBackend) -> tuple[list[RankHoldings], int]:
    """(holdings of each pipeline position, parameters of the whole model).

    Raises the ConfigErrors of building the model.
    """
    wholes: dict[str, int] = {}  # by name, so that a tied weight with two copies counts once
    held = []
    for pp in range(sizes.pp):
        mesh = plan_mesh(sizes, rank_of(sizes, dp=0, tp=0, pp=pp), torch.device("meta"))
        stages = build_stages(config, mesh, backend)
        params = _parameters(stages)
        wholes.update({param.shard_spec.name: math.prod(param.shard_spec.shape) for param in params})
        buckets = build_buckets(list(params), mesh.zero, config, params)
        held.append(
            RankHoldings(
                pp=pp,
                stages=stages,
                parameters=sum(bucket.numel for bucket in buckets),
                zero_elements=tuple(sum(b.elements_on(rank) for b in buckets) for rank in range(sizes.zero)),
                buckets=tuple(bucket_sizes(bucket, params, config.ema) for bucket in buckets),
            )
        )
    return held, sum(wholes.values())


def rebucketed(held: RankHoldings, config: Config, sizes: Sizes) -> tuple[BucketSizes, ...]:
    """Buckets of these stages with another `config`, such as another reduce_bucket_size."""
    mesh = plan_mesh(sizes, rank_of(sizes, dp=0, tp=0, pp=held.pp), torch.device("meta"))
    params = _parameters(held.stages)
    buckets = build_buckets(list(params), mesh.zero, config, params)
    return tuple(bucket_sizes(bucket, params, config.ema) for bucket in buckets)


def _parameters(stages: Stages) -> dict[Parameter, int]:
    """Parameters in forward order, with the number of their unit."""
    return {cast(Parameter, param): n for n, unit in enumerate(units_of(stages)) for param in unit.parameters()}


def bucket_sizes(bucket: Bucket, unit_of: Mapping[Parameter, int], ema: EmaConfig | None) -> BucketSizes:
    """`unit_of`: the number of the unit of each parameter, in forward order."""
    shard, dtype, group = bucket.shard_size, bucket.kind.dtype, bucket.kind.group
    rule = RULES[group.rule]
    state_tensors = len(rule.roles_with(group))
    exact = max(4, dtype.itemsize)  # updates are computed in fp32, or in the weights' own dtype if that is wider
    half = dtype.itemsize < 4
    products = [0] * (bucket.weights.numel() // shard)
    for slot in bucket.slots:
        products[slot.start // shard] += rule.product_flops(slot.param, group)
    ranks = range(len(products))
    exchanged = max(map(bucket.elements_on, ranks)) * exact if any(products) and bucket.kind.tp_sharded else 0
    bf16 = group.options.moments == "bf16"
    return BucketSizes(
        weights=bucket.weights.nbytes,
        grads=bucket.grads.nbytes,
        shard_grads=bucket.grad_shard.nbytes,
        masters=shard * exact if half else 0,
        moments=state_tensors * shard * (2 if bf16 else exact),
        expanded=state_tensors * shard * exact if bf16 else 0,
        update_grads=shard * exact if bucket.grads.dtype.itemsize < exact else 0,
        partial_over=bucket.kind.partial_over,
        shard_weights=bucket.weight_shard.nbytes,
        units=tuple(sorted({unit_of[slot.param] for slot in bucket.slots})),
        product_flops=tuple(products),
        exchanged=exchanged,
        # Directions; with `exchanged` also whole parameters, those joined to be sent, what is sent, and what comes.
        update_workspace=(5 if exchanged else 1) * shard * exact * any(products),
        averages=0 if ema is None else shard * exact,
        averages_moved=0 if ema is None else 3 * shard * exact // ema.every,
    )
