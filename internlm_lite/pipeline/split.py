"""Assigns layers to stages and stages to pipeline ranks. Pure functions, the same on every rank.

1f1b, size 4          rank 0: stage 0       rank 1: 1       rank 2: 2       rank 3: 3
interleaved, 2 chunks rank 0: stages 0, 4   rank 1: 1, 5    rank 2: 2, 6    rank 3: 3, 7
zbv, 2 chunks         rank 0: stages 0, 7   rank 1: 1, 6    rank 2: 2, 5    rank 3: 3, 4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, permutations

_REACH = 7
"""Most neighbouring stages of which the busiest is not the giver that a move changes."""


def stage_to_rank(size: int, chunks: int, schedule: str) -> tuple[int, ...]:
    """The pipeline rank of each stage, in layer order; `chunks`: stages per rank."""
    return (*range(size), *reversed(range(size))) if schedule == "zbv" else tuple(range(size)) * chunks


def rank_to_stages(rank: int, size: int, chunks: int, schedule: str) -> tuple[int, ...]:
    """Numbers of the stages on pipeline rank `rank`, in layer order."""
    return tuple(stage for stage, held_by in enumerate(stage_to_rank(size, chunks, schedule)) if held_by == rank)


def split_layers(blocks: Sequence[float], stage_ranks: Sequence[int], *, embedding: float, head: float) -> list[range]:
    """A contiguous range of layers for each stage that minimises the largest cost of a rank (the sum over its stages);
    among those splits, one with small stages: each further layer goes to the cheapest rank's cheapest stage.

    `blocks`: the cost of each layer; `stage_ranks`: the pipeline rank of each stage; `embedding`, `head`: cost of the
    embedding (first stage) and of the head (last stage); all in any unit. Every stage gets at least one layer.
    Layers that differ are split as equal ones, then moved while that lowers the largest cost: rarely not the minimum.
    """
    stages, block = len(stage_ranks), sum(blocks) / len(blocks)
    assert len(blocks) >= stages, (len(blocks), stages)
    costs = [block] * stages
    costs[0] += embedding
    costs[-1] += head
    busy = [0.0] * (max(stage_ranks) + 1)
    for cost, rank in zip(costs, stage_ranks, strict=True):
        busy[rank] += cost
    counts = [1] * stages
    for _ in range(len(blocks) - stages):
        chosen = min(range(stages), key=lambda stage: (busy[stage_ranks[stage]], costs[stage]))
        costs[chosen] += block
        busy[stage_ranks[chosen]] += block
        counts[chosen] += 1
    borders = (0, *accumulate(counts))
    if min(blocks) < max(blocks):
        borders = _moved(borders, _Loads((0.0, *accumulate(blocks)), tuple(stage_ranks), embedding, head))
    return [range(start, stop) for start, stop in pairwise(borders)]


@dataclass(frozen=True)
class _Loads:
    before: Sequence[float]
    """Of each layer: the cost of all layers before it."""
    stage_ranks: tuple[int, ...]
    embedding: float
    head: float

    def __call__(self, borders: Sequence[int]) -> dict[int, float]:
        """The cost of each rank."""
        found = dict.fromkeys(self.stage_ranks, 0.0)
        found[self.stage_ranks[0]] += self.embedding
        found[self.stage_ranks[-1]] += self.head
        for rank, (start, stop) in zip(self.stage_ranks, pairwise(borders), strict=True):
            found[rank] += self.before[stop] - self.before[start]
        return found


def _moved(borders: tuple[int, ...], loads: _Loads) -> tuple[int, ...]:
    """`borders` after moves, the best one each time, as long as that makes the busiest ranks less busy. A move takes a
    layer from one stage and gives one to another, while those between them pass one on."""
    stages = range(len(borders) - 1)

    def sorted_loads(move: tuple[int, ...]) -> list[float]:
        return sorted(loads(move).values(), reverse=True)

    while True:
        now = loads(borders)
        busiest = {stage for stage in stages if now[loads.stage_ranks[stage]] == max(now.values())}
        moves = [borders]
        for giver, taker in permutations(stages, 2):
            passing = range(min(giver, taker), max(giver, taker) + 1)
            if giver in busiest or (len(passing) <= _REACH and not busiest.isdisjoint(passing)):
                step = 1 if taker < giver else -1
                moves.append(tuple(border + step * (n - 1 in passing[:-1]) for n, border in enumerate(borders)))
        best = min((move for move in moves if all(start < stop for start, stop in pairwise(move))), key=sorted_loads)
        if best == borders:
            return borders
        borders = best
