"""Bytes that a rank sends in one step, per collective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

from internlm_lite.apps.planner.holdings import RankHoldings
from internlm_lite.layers.costs import Message, RowShape
from internlm_lite.mesh.mesh import Sizes

AXES = ("tp", "cp", "pp", "zero", "replica", "ends", "world")


def messages(row: RowShape, sizes: Sizes, holding: RankHoldings, micro_num: int) -> list[Message]:
    """Messages that a rank of this pipeline position sends in a step of `micro_num` micro-batches."""
    once = [message for stage in holding.stages.values() for message in stage.messages(row)]
    found = [replace(message, times=message.times * micro_num) for message in once]
    found += [*_pipeline(row, holding, micro_num), *_optimizer(holding, micro_num)]
    return [message for message in found if message.times and _group_size(sizes, message.axis) > 1]


def traffic(found: Sequence[Message], sizes: Sizes) -> dict[str, int]:
    """Bytes sent by axis, rounded to whole bytes."""
    totals = dict.fromkeys(AXES, Fraction(0))
    for message in found:
        totals[message.axis] += message.sent(_group_size(sizes, message.axis))
    return {axis: round(total) for axis, total in totals.items()}


def host_traffic(holding: RankHoldings, row: RowShape, micro_num: int) -> int:
    """Bytes between a device and its host in a step: activations that leave, and return."""
    return 2 * micro_num * sum(stage.host_bytes(row) for stage in holding.stages.values())


def _group_size(sizes: Sizes, axis: str) -> int:
    if axis == "ends":
        return min(2, sizes.pp)
    return int(getattr(sizes, axis))


def _pipeline(row: RowShape, holding: RankHoldings, micro_num: int) -> Iterator[Message]:
    """A stage sends its output forward and the gradient of its input backward, unless the neighbour is on this rank."""
    for number, stage in holding.stages.items():
        if not stage.spec.last and number + 1 not in holding.stages:
            yield Message("pp", "send", stage.hidden_bytes(row), micro_num)
        if not stage.spec.first and number - 1 not in holding.stages:
            yield Message("pp", "send", stage.hidden_bytes(row), micro_num, backward=True)


def _optimizer(holding: RankHoldings, micro_num: int) -> Iterator[Message]:
    for bucket in holding.buckets:
        yield Message("zero", "reduce_scatter", bucket.grads, bucket.reductions(micro_num))
        yield Message("replica", "all_reduce", bucket.shard_grads)
        for axis in bucket.partial_over:  # partial gradients of whole parameters
            yield Message(axis, "all_reduce", bucket.shard_grads)
        yield Message("tp", "all_to_all", bucket.exchanged, times=2 * (bucket.exchanged > 0))
        yield Message("zero", "all_gather", bucket.weights, bucket.gathered(micro_num))
    yield Message("world", "all_reduce", 6 * 8)  # gradient norm, labels, loss, requests to stop
