"""Assigns layers to stages and stages to pipeline ranks. Pure functions, the same on every rank.

1f1b, size 4          rank 0: stage 0       rank 1: 1       rank 2: 2       rank 3: 3
interleaved, 2 chunks rank 0: stages 0, 4   rank 1: 1, 5    rank 2: 2, 6    rank 3: 3, 7
zbv, 2 chunks         rank 0: stages 0, 7   rank 1: 1, 6    rank 2: 2, 5    rank 3: 3, 4
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def stage_to_rank(size: int, chunks: int, schedule: str) -> tuple[int, ...]:
    """The pipeline rank of each stage, in layer order; `chunks`: stages per rank."""
    return (*range(size), *reversed(range(size))) if schedule == "zbv" else tuple(range(size)) * chunks


def rank_to_stages(rank: int, size: int, chunks: int, schedule: str) -> tuple[int, ...]:
    """Numbers of the stages on pipeline rank `rank`, in layer order."""
    return tuple(stage for stage, held_by in enumerate(stage_to_rank(size, chunks, schedule)) if held_by == rank)


def split_layers(
    num_layers: int, stage_ranks: Sequence[int], *, block: float, embedding: float, head: float
) -> list[range]:
    """A contiguous range of layers for each stage that minimises the largest cost of a rank (the sum over its stages);
    among those splits, one with small stages: each further layer goes to the cheapest rank's cheapest stage.

    `stage_ranks`: the pipeline rank of each stage. `block`, `embedding`, `head`: cost of one layer, of the embedding
    (first stage) and of the head (last stage), in any unit. Every stage gets at least one layer: num_layers >= stages.
    """
    stages = len(stage_ranks)
    assert num_layers >= stages, (num_layers, stages)
    costs = [block] * stages
    costs[0] += embedding
    costs[-1] += head
    busy = [0.0] * (max(stage_ranks) + 1)
    for cost, rank in zip(costs, stage_ranks, strict=True):
        busy[rank] += cost
    counts = [1] * stages
    for _ in range(num_layers - stages):
        chosen = min(range(stages), key=lambda stage: (busy[stage_ranks[stage]], costs[stage]))
        costs[chosen] += block
        busy[stage_ranks[chosen]] += block
        counts[chosen] += 1
    return [range(start, stop) for start, stop in pairwise((0, *accumulate(counts)))]
