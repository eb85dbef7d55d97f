"""How long a rank waits for others: buckets are reduced behind the backward pass, weights gathered behind the forward.

backward   | head | block n | ... | block 0 |
scatter           | bucket 0 |   | bucket 1 | bucket 2 |            the end, after the backward pass, is exposed
gather     | bucket 2 | bucket 1 | bucket 0 |
forward               | embedding |    | block 0 | ...              each unit waits for its own weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from internlm_lite.apps.planner.bucket_sizes import BucketSizes
from internlm_lite.apps.planner.device_file import DeviceFile, Link
from internlm_lite.layers.costs import Message
from internlm_lite.mesh.mesh import Sizes


@dataclass(frozen=True)
class Axis:
    """The groups of one axis."""

    size: int
    link: Link
    """Between nodes, if any group has ranks on two."""

    def seconds(self, message: Message) -> float:
        if self.size == 1:
            return 0.0
        hops = 1 if message.kind == "send" else math.ceil(math.log2(self.size))
        latency = message.times * hops * self.link.latency_us * 1e-6
        return latency + float(message.sent(self.size)) / (self.link.gb_per_s * 1e9)


def network(device: DeviceFile, sizes: Sizes) -> dict[str, Axis]:
    """Axis -> its groups; node k holds ranks k * gpus_per_node and the next ones.

    The groups of an axis, side by side, fill blocks of neighbours. One of them has ranks on two nodes if a node ends
    inside a block: no group is listed, so ten thousand nodes take no longer than one."""
    copies = sizes.tp * sizes.alike
    blocks = {
        "world": (sizes.world, sizes.world),
        "tp": (sizes.tp, sizes.tp),
        "cp": (sizes.cp, sizes.tp * sizes.cp),
        "dp": (sizes.dp, copies),
        "zero": (sizes.zero, sizes.tp * sizes.zero),
        "replica": (sizes.replica, copies),
        "pp": (sizes.pp, sizes.world),
        "ends": (min(sizes.pp, 2), sizes.world),
    }
    node = device.gpus_per_node

    def axis(size: int, block: int) -> Axis:
        crosses = size > 1 and sizes.world > node and node % block > 0
        return Axis(size, device.inter_node if crosses else device.intra_node)

    return {name: axis(size, block) for name, (size, block) in blocks.items()}


@dataclass(frozen=True)
class Exposed:
    """Seconds of one step in which a rank waits for its collectives."""

    scatter: float
    replicas: float
    """All-reduces over `replica`, and over axes with partial sums."""
    gather: float
    total: float
    """Of reduce-scatter and gather, exposed or not."""

    @property
    def fraction(self) -> float:
        """Of reduce-scatter and gather."""
        return (self.scatter + self.gather) / self.total if self.total else 0.0


def exposed(
    buckets: Sequence[BucketSizes],
    axes: dict[str, Axis],
    backward: Sequence[float],
    forward: Sequence[float],
    *,
    hidden: tuple[bool, bool],
    micro_num: int = 1,
) -> Exposed:
    """`backward`, `forward`: seconds of the rank's units, in forward order, in one micro-batch; `hidden`: whether
    gradients, and weights, are sent while others are computed. From ZeRO stage 2 on every micro-batch reduces, in
    stage 3 it gathers, too."""
    zero = axes["zero"]
    scatters = [zero.seconds(Message("zero", "reduce_scatter", bucket.grads)) for bucket in buckets]
    gathers = [zero.seconds(Message("zero", "all_gather", bucket.weights)) for bucket in buckets]
    scatter_ends, backward_end = _scatter(buckets, scatters, backward, overlap=hidden[0])
    clock = max([backward_end, *scatter_ends[-1:]])
    scattered = clock - backward_end
    replicas = 0.0
    for bucket in buckets:
        for axis in ("replica", *bucket.partial_over):
            replicas += axes[axis].seconds(Message(axis, "all_reduce", bucket.shard_grads))
    all_scatters = sum(taken * one.reductions(micro_num) for one, taken in zip(buckets, scatters, strict=True))
    all_gathers = sum(taken * one.gathered(micro_num) for one, taken in zip(buckets, gathers, strict=True))
    if buckets[0].stage > 1:  # what the passes before the last one's do not hide
        room = sum(backward) + sum(forward) if hidden[0] else 0.0
        scattered += (micro_num - 1) * max(0.0, sum(scatters) - room)
    if not hidden[1]:
        gathered = all_gathers
    elif any(per_micro for _, per_micro in (bucket.gathers for bucket in buckets)):
        gathered = micro_num * _unit_gathers(buckets, gathers, scatters, (forward, backward))
    else:
        gathered = _gather(buckets, gathers, forward)
    return Exposed(scattered, replicas, gathered, all_scatters + all_gathers)


def _unit_gathers(
    buckets: Sequence[BucketSizes],
    gathers: Sequence[float],
    scatters: Sequence[float],
    passes: tuple[Sequence[float], Sequence[float]],
) -> float:
    """Seconds by which the passes of a micro-batch are late in stage 3: a unit's weights come while the one before it
    computes; in the backward pass gradients of the one behind it leave on the same links.

    `passes`: seconds of the units, forward and backward."""
    forward, backward = passes
    weights, gradients = [0.0] * len(forward), [0.0] * len(forward)
    for bucket, gather, scatter in zip(buckets, gathers, scatters, strict=True):
        if sum(bucket.gathers):
            weights[bucket.units[0]] += gather * (bucket.gathers[1] > 0)
            gradients[bucket.units[0]] += scatter
    late = weights[0]
    for unit in range(1, len(forward)):
        late += max(0.0, weights[unit] - forward[unit - 1])
        sent = weights[unit - 1] * (unit > 1) + (gradients[unit + 1] if unit + 1 < len(forward) else 0.0)
        late += max(0.0, sent - backward[unit])
    return late


def _scatter(
    buckets: Sequence[BucketSizes], seconds: Sequence[float], backward: Sequence[float], *, overlap: bool
) -> tuple[list[float], float]:
    """(end of each bucket's reduce-scatter, end of the backward pass); buckets start strictly in order."""
    done, clock = [0.0] * len(backward), 0.0
    for index in reversed(range(len(backward))):
        clock += backward[index]
        done[index] = clock
    ends, free = [], 0.0
    for bucket, taken in zip(buckets, seconds, strict=True):
        ready = max(done[unit] for unit in bucket.units) if overlap else clock
        free = max(free, ready) + taken
        ends.append(free)
    return ends, clock


def _gather(buckets: Sequence[BucketSizes], seconds: Sequence[float], forward: Sequence[float]) -> float:
    """Seconds by which the forward pass is late, because units wait for their weights."""
    arrived, free = [0.0] * len(forward), 0.0
    for bucket, taken in zip(reversed(buckets), reversed(seconds), strict=True):
        free += taken
        for unit in bucket.units:
            arrived[unit] = max(arrived[unit], free)
    clock = 0.0
    for weights, taken in zip(arrived, forward, strict=True):
        clock = max(clock, weights) + taken
    return clock - sum(forward)
