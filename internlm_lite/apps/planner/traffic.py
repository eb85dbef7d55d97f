"""What a rank sends in one step, collective by collective.

Bytes sent by one rank of n, for a whole tensor of b bytes (ring or pairwise exchange, the least that is possible):

    all_reduce                                   2 (n - 1) / n * b        a reduce-scatter, then an all-gather
    reduce_scatter, all_gather, all_to_all         (n - 1) / n * b
    send                                                       b
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from internlm_lite.apps.planner.holdings import Holding, StageShare
from internlm_lite.apps.planner.memory import Shape
from internlm_lite.config.schema import Config
from internlm_lite.layers.loss import tokens_per_chunk
from internlm_lite.mesh.mesh import Sizes
from internlm_lite.pipeline.split import stages_on

AXES = ("tp", "pp", "zero", "replica", "ends", "world")


@dataclass(frozen=True)
class Message:
    """`times` collectives of one kind over an axis."""

    axis: str
    kind: str
    """all_reduce, reduce_scatter, all_gather, all_to_all or send."""
    n_bytes: int
    """The whole tensor: what all ranks of the group hold together, or each of them for all_reduce."""
    times: int = 1
    why: str = ""

    def sent(self, size: int) -> Fraction:
        """Bytes that one rank of a group of `size` sends."""
        if self.kind == "send":
            return Fraction(self.times * self.n_bytes)
        passes = 2 if self.kind == "all_reduce" else 1
        return Fraction(passes * (size - 1) * self.times * self.n_bytes, size)


def messages(config: Config, x: Shape, sizes: Sizes, holding: Holding, micro_num: int) -> list[Message]:
    """All that a rank of this pipeline position sends in a step of `micro_num` micro-batches."""
    found: list[Message] = []
    if sizes.tp > 1:
        for stage in holding.stages:
            found += _tensor_parallel(config, x, stage, micro_num)
    found += _pipeline(config, x, sizes, holding, micro_num)
    found += _optimizer(sizes, holding)
    return [message for message in found if message.times and _group_size(sizes, message.axis) > 1]


def traffic(found: Sequence[Message], sizes: Sizes) -> dict[str, int]:
    """Bytes sent by axis, rounded to whole bytes."""
    totals = dict.fromkeys(AXES, Fraction(0))
    for message in found:
        totals[message.axis] += message.sent(_group_size(sizes, message.axis))
    return {axis: round(total) for axis, total in totals.items()}


def _group_size(sizes: Sizes, axis: str) -> int:
    if axis == "ends":
        return min(2, sizes.pp)
    return int(getattr(sizes, axis))


def _tensor_parallel(config: Config, x: Shape, stage: StageShare, micro_num: int) -> Iterator[Message]:
    again = len(range(stage.layers.start, min(stage.layers.stop, config.model.recomputed_layers)))
    forward, backward = (len(stage.layers) + again) * micro_num, len(stage.layers) * micro_num
    hidden = x.T * x.h * x.s
    if x.by_sequence:
        yield Message("tp", "all_gather", hidden, 2 * forward, "inputs of wqkv and w1, w3")
        yield Message("tp", "reduce_scatter", hidden, 2 * forward, "outputs of wo and w2")
        yield Message("tp", "all_gather", hidden, 2 * backward, "the same inputs again, for the weights' gradients")
        yield Message("tp", "all_gather", hidden, 2 * backward, "gradients of those outputs")
        yield Message("tp", "reduce_scatter", hidden, 2 * backward, "gradients of those inputs")
    else:
        yield Message("tp", "all_reduce", hidden, 2 * forward, "outputs of wo and w2")
        yield Message("tp", "all_reduce", hidden, 2 * backward, "gradients of the inputs of wqkv and w1, w3")
    if stage.first:
        yield from _embedding(x, micro_num)
    if stage.last:
        yield from _head(x, micro_num)


def _embedding(x: Shape, micro_num: int) -> Iterator[Message]:
    hidden, by_vocabulary = x.T * x.h * x.s, x.model.embedding_by_vocabulary
    if not x.by_sequence:
        kind = "all_reduce" if by_vocabulary else "all_gather"
        yield Message("tp", kind, hidden, micro_num, "embedding")
    elif by_vocabulary:
        yield Message("tp", "reduce_scatter", hidden, micro_num, "embedding")
        yield Message("tp", "all_gather", hidden, micro_num, "gradient of the embedding")
    else:
        yield Message("tp", "all_to_all", hidden // x.tp, 2 * micro_num, "embedding and its gradient")


def _head(x: Shape, micro_num: int) -> Iterator[Message]:
    hidden = x.T * x.h * x.s
    if x.by_sequence:
        yield Message("tp", "all_gather", hidden, micro_num, "input of the head")
        yield Message("tp", "reduce_scatter", hidden, micro_num, "gradient of the head's input")
    else:
        yield Message("tp", "all_reduce", hidden, micro_num, "gradient of the head's input")
    for tokens, times in _chunks(x, micro_num):
        if x.model.parallel_output:
            yield Message("tp", "all_reduce", tokens * x.w, times, "largest logit of each token")
            yield Message("tp", "all_reduce", 3 * tokens * x.w, times, "sums over the vocabulary")
        else:
            yield Message("tp", "all_gather", tokens * x.vocab_size * x.w, times, "logits")


def _chunks(x: Shape, micro_num: int) -> Iterator[tuple[int, int]]:
    """(tokens, how often) of the chunks in which the loss is computed."""
    chunk = tokens_per_chunk(x.T, x.V, x.w, x.device)
    yield chunk, x.T // chunk * micro_num
    yield x.T % chunk, micro_num if x.T % chunk else 0


def _pipeline(config: Config, x: Shape, sizes: Sizes, holding: Holding, micro_num: int) -> Iterator[Message]:
    """A stage sends its output forward and the gradient of its input backward, unless the neighbour is on this rank."""
    mine = stages_on(holding.pp, sizes.pp, config.model.num_chunks, config.schedule) if sizes.pp > 1 else (0,)
    hidden = x.t * x.h * x.s
    for stage in holding.stages:
        if not stage.last and stage.number + 1 not in mine:
            yield Message("pp", "send", hidden, micro_num, "activations to the next stage")
        if not stage.first and stage.number - 1 not in mine:
            yield Message("pp", "send", hidden, micro_num, "gradients to the stage before")


def _optimizer(sizes: Sizes, holding: Holding) -> Iterator[Message]:
    for bucket in holding.buckets:
        yield Message("zero", "reduce_scatter", bucket.grads, why="gradients")
        yield Message("replica", "all_reduce", bucket.shard_grads, why="gradients of the shard")
        for axis in bucket.summed:
            yield Message(axis, "all_reduce", bucket.shard_grads, why="partial gradients of whole parameters")
        yield Message("zero", "all_gather", bucket.weights, why="weights")
    yield Message("world", "all_reduce", 6 * 8, why="gradient norm, labels, loss, requests to stop")
