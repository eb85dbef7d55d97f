"""What the ranks hold: the stages are built on the meta device and assigned to the optimizer's buckets.

Nothing is allocated; parameters, padding and bytes are exactly those of the trainer's tensors.
Ranks that differ only in tp, zero or replica hold the same amounts, so one rank of each pipeline position is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.apps.planner.gather_counts import planned_gathers
from internlm_lite.config.schema import Config, EmaConfig
from internlm_lite.layers.flash import AttentionBackend
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Sizes, plan_mesh, rank_of
from internlm_lite.models.stages import Stages, build_stages, first_units, units_of
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.rules import RULES


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
    wholes: tuple[tuple[int, int], ...] = ((0, 0),)
    """Bytes of weights and gradients that ZeRO stages 2 and 3 hold for a while, at most (in the loss, else): those of
    two units; in steps of one micro-batch, of two, and so on; the last ones hold for more."""

    @property
    def weights(self) -> int:
        """Bytes that last."""
        return sum(bucket.weights for bucket in self.buckets if bucket.stage < 3)

    @property
    def gradients(self) -> int:
        """Bytes that last."""
        return sum(bucket.grads if bucket.stage == 1 else bucket.shard_grads for bucket in self.buckets)

    def whole(self, micro_num: int) -> tuple[int, int]:
        """Of `wholes`."""
        return self.wholes[min(micro_num, len(self.wholes)) - 1]

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
        gathers, peaks = planned_gathers(buckets, units_of(stages), first_units(stages), mesh, config)
        held.append(
            RankHoldings(
                pp=pp,
                stages=stages,
                parameters=sum(bucket.numel for bucket in buckets),
                zero_elements=tuple(sum(b.elements_on(rank) for b in buckets) for rank in range(sizes.zero)),
                buckets=_sizes_of(buckets, params, gathers, config),
                wholes=peaks,
            )
        )
    return held, sum(wholes.values())


def rebucketed(held: RankHoldings, config: Config, sizes: Sizes) -> tuple[BucketSizes, ...]:
    """Buckets of these stages with another `config`, such as another reduce_bucket_size."""
    return with_buckets(held, config, sizes).buckets


def with_buckets(held: RankHoldings, config: Config, sizes: Sizes) -> RankHoldings:
    """The same stages with the buckets of another `config`, such as another stage of ZeRO."""
    mesh = plan_mesh(sizes, rank_of(sizes, dp=0, tp=0, pp=held.pp), torch.device("meta"))
    params = _parameters(held.stages)
    buckets = build_buckets(list(params), mesh.zero, config, params)
    gathers, peaks = planned_gathers(buckets, units_of(held.stages), first_units(held.stages), mesh, config)
    return replace(held, buckets=_sizes_of(buckets, params, gathers, config), wholes=peaks)


def _sizes_of(
    buckets: Sequence[Bucket], unit_of: Mapping[Parameter, int], gathers: Sequence[tuple[int, int]], config: Config
) -> tuple[BucketSizes, ...]:
    found = [bucket_sizes(bucket, unit_of, config.ema) for bucket in buckets]
    return tuple(replace(one, gathers=count) for one, count in zip(found, gathers, strict=True))


def _parameters(stages: Stages) -> dict[Parameter, int]:
    """Parameters in forward order, with the number of their unit."""
    return {cast(Parameter, param): n for n, unit in enumerate(units_of(stages)) for param in unit.parameters()}


def bucket_sizes(bucket: Bucket, unit_of: Mapping[Parameter, int], ema: EmaConfig | None) -> BucketSizes:
    """`unit_of`: the number of the unit of each parameter, in forward order."""
    shard, dtype, group = bucket.shard_size, bucket.kind.dtype, bucket.kind.group
    rule = RULES[group.rule]
    state_tensors = len(rule.roles_with(group))
    exact = max(4, dtype.itemsize)  # updates are computed in fp32, or in the weights' own dtype if that is wider
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
        masters=bucket.master.nbytes if bucket.copies_master else 0,
        moments=state_tensors * shard * (2 if bf16 else exact),
        expanded=state_tensors * shard * exact if bf16 else 0,
        update_grads=shard * exact if bucket.grad_shard.dtype.itemsize < exact else 0,
        partial_over=bucket.kind.partial_over,
        shard_weights=shard * dtype.itemsize,
        units=tuple(sorted({unit_of[slot.param] for slot in bucket.slots})),
        product_flops=tuple(products),
        exchanged=exchanged,
        # Directions; with `exchanged` also whole parameters, those joined to be sent, what is sent, and what comes.
        update_workspace=(5 if exchanged else 1) * shard * exact * any(products),
        averages=0 if ema is None else shard * exact,
        averages_moved=0 if ema is None else 3 * shard * exact // ema.every,
        stage=bucket.stage,
    )
