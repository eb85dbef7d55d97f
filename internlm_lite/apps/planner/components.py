"""Parameters, memory and FLOPs of the components of a whole model: once, whatever the layout, without padding.

A component is a module of every layer, named as in checkpoints: `feed_forward.w1` are the matrices of that name of all
layers. What a module computes beside its parts is a component, too: `attention` are the products of queries and keys,
and of their weights and values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from internlm_lite.apps.planner.holdings import bucket_sizes
from internlm_lite.config.schema import Config, EmaConfig
from internlm_lite.layers.costs import CostedLayer
from internlm_lite.layers.cross_attention import CrossAttention
from internlm_lite.layers.source_side import OnSource, of_source
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.decoder import Transformer
from internlm_lite.models.stages import meta_model
from internlm_lite.optim.buckets import Bucket, build_buckets
from internlm_lite.optim.groups import ParamGroup, check_patterns
from internlm_lite.optim.rules import RULES


@dataclass(frozen=True)
class Component:
    name: str
    parameters: int = 0
    decayed: int = 0
    """Those with weight decay."""
    weights: int = 0
    """Bytes, as the next two."""
    gradients: int = 0
    optimizer: int = 0
    """Master weights, the state of the update rule, and the average of the weights."""
    flops: tuple[int, ...] = ()
    """Per token of a forward pass, for each of the lengths of `Components`."""


@dataclass(frozen=True)
class GroupShare:
    """What the parameters of one group (`optim.groups`) have and hold, whole and once, and what a step moves."""

    name: str
    rule: str
    lr: float
    """Peak learning rate."""
    weight_decay: float
    averages: str
    """Its momentum, or its betas; "by step": beta2_scheduler."""
    parameters: int
    tensors: int
    state: int
    """Bytes of the update rule's state, without master weights."""
    traffic: int
    """Bytes that the update reads and writes: gradient, master weights, state."""


@dataclass(frozen=True)
class Components:
    lengths: tuple[int, ...]
    """Tokens of the documents that `flops` are counted for."""
    rows: tuple[Component, ...]
    flops_without_attention: int
    """Of all rows, per token of a forward pass."""
    update_flops: int | None
    """Operations of the update rules in a step; None: one does not say."""
    groups: tuple[GroupShare, ...]

    @property
    def total(self) -> Component:
        return _sum("sum", self.rows)

    def flops_6n(self, index: int) -> int:
        """6 * parameters + attention: FLOPs of a token, forward and backward, by the estimate of PaLM's paper
        (arXiv:2204.02311, appendix B), which counts norms and an embedding like matrices."""
        total = self.total
        return 6 * total.parameters + 3 * (total.flops[index] - self.flops_without_attention)


def components_of(config: Config, lengths: Sequence[int]) -> Components:
    """Of the model of `config`, whose FLOPs are counted for documents of each of `lengths`."""
    model = meta_model(config.model, config.source_share)
    rows: dict[str, list[Component]] = {}
    params = {cast(Parameter, param): name.rpartition(".")[0] for name, param in model.named_parameters()}
    check_patterns(config, [param.shard_spec.name for param in params])
    buckets = build_buckets(list(params), single_process_mesh(torch.device("meta")).zero, config)
    for row in (*_held(buckets, params, config.ema), *_computed(model, lengths)):
        rows.setdefault(row.name, []).append(row)
    in_order = dict.fromkeys(_name(path) for path, _ in model.named_modules())
    summed = tuple(_sum(name, rows[name]) for name in in_order if name in rows)
    return Components(
        lengths=tuple(lengths),
        rows=summed,
        flops_without_attention=model.flops_per_token(0),
        update_flops=_update_flops(buckets),
        groups=tuple(_group_shares(buckets, params)),
    )


def _group_shares(buckets: Sequence[Bucket], params: Mapping[Parameter, str]) -> Iterator[GroupShare]:
    owner = dict.fromkeys(params, 0)
    members: dict[ParamGroup, list[Bucket]] = {}
    for bucket in reversed(buckets):
        members.setdefault(bucket.kind.group, []).append(bucket)
    for group, own in members.items():
        held = [(bucket.numel / bucket.shard_size, bucket_sizes(bucket, owner, None)) for bucket in own]
        yield GroupShare(
            name=group.name,
            rule=group.rule,
            lr=group.lr,
            weight_decay=group.weight_decay,
            averages=group.averages,
            parameters=sum(bucket.numel for bucket in own),
            tensors=sum(len(bucket.slots) for bucket in own),
            state=round(sum(share * sizes.moments for share, sizes in held)),
            traffic=round(sum(share * sizes.update_traffic for share, sizes in held)),
        )


def _update_flops(buckets: Sequence[Bucket]) -> int | None:
    total = 0
    for bucket in buckets:
        group = bucket.kind.group
        operations = RULES[group.rule].operations(group)
        if operations is None:
            return None
        total += bucket.numel * (operations + 2 * (group.weight_decay > 0))
        total += sum(RULES[group.rule].product_flops(slot.param, group) for slot in bucket.slots)
    return total


def _held(buckets: Sequence[Bucket], params: Mapping[Parameter, str], ema: EmaConfig | None) -> Iterator[Component]:
    """A row for every parameter (whose module `params` names), with the bytes per element of its bucket."""
    owner = dict.fromkeys(params, 0)
    for bucket in buckets:
        sizes, padded = bucket_sizes(bucket, owner, ema), bucket.shard_size
        for slot in bucket.slots:
            n = slot.stop - slot.start
            yield Component(
                name=_name(params[slot.param]),
                parameters=n,
                decayed=n * (bucket.kind.group.weight_decay > 0),
                weights=n * sizes.weights // padded,
                gradients=n * sizes.grads // padded,
                optimizer=n * (sizes.masters + sizes.moments + sizes.averages) // padded,
            )


def _computed(model: Transformer, lengths: Sequence[int]) -> Iterator[Component]:
    """A row for every layer that computes something beside what its parts compute."""
    share = model.tp_ctx.source_share
    inside: set[nn.Module] = {part.wkv for part in model.modules() if isinstance(part, CrossAttention)}
    for unit in model.units():
        inside |= {part for part in unit.modules() if isinstance(unit, OnSource) and part is not unit}

    def flops(layer: CostedLayer, n: int) -> int:
        return int(layer.flops_per_token(of_source(n, share)) * share if layer in inside else layer.flops_per_token(n))

    for path, layer in model.named_modules():
        if isinstance(layer, CostedLayer):
            parts = list(layer.units())
            own = [flops(layer, n) - sum(flops(part, n) for part in parts) for n in lengths]
            if any(own):
                yield Component(_name(path), flops=tuple(own))


def _name(path: str) -> str:
    """layers.3.feed_forward.w1 -> feed_forward.w1"""
    return ".".join(part for part in path.split(".") if part != "layers" and not part.isdigit())


def _sum(name: str, rows: Iterable[Component]) -> Component:
    rows = list(rows)
    flops = [row.flops for row in rows if row.flops]
    counts = ("parameters", "decayed", "weights", "gradients", "optimizer")
    return Component(
        name,
        **{key: sum(getattr(row, key) for row in rows) for key in counts},
        flops=tuple(map(sum, zip(*flops, strict=True))),
    )
