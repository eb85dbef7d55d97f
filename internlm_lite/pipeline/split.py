"""Which layers make up a stage, and which stages a pipeline rank has. Pure arithmetic, the same on every rank.

1f1b, size 4          rank 0: stage 0       rank 1: 1       rank 2: 2       rank 3: 3
interleaved, 2 chunks rank 0: stages 0, 4   rank 1: 1, 5    rank 2: 2, 6    rank 3: 3, 7
zbv, 2 chunks         rank 0: stages 0, 7   rank 1: 1, 6    rank 2: 2, 5    rank 3: 3, 4
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def stages_on(rank: int, size: int, chunks: int, schedule: str) -> tuple[int, ...]:
    """Numbers of the stages on pipeline rank `rank`, in the order of the layers."""
    if schedule == "zbv":
        return (rank, 2 * size - 1 - rank)
    return tuple(range(rank, size * chunks, size))


def home_of(stage: int, size: int, schedule: str) -> int:
    """The pipeline rank that has a stage."""
    if schedule == "zbv":
        return min(stage, 2 * size - 1 - stage)
    return stage % size


def split_layers(num_layers: int, homes: Sequence[int], block: float, embedding: float, head: float) -> list[range]:
    """Contiguous layers for each stage, so that the busiest rank has as little to do as can be; every micro-batch goes
    through all stages of a rank. Next, so that the dearest of a rank's stages is as cheap as can be.

    `homes`: the pipeline rank of each stage. `block`, `embedding`, `head`: cost of one layer, of what the first stage
    has besides, and the last. Every stage gets at least one layer: num_layers >= stages.
    """
    stages = len(homes)
    assert num_layers >= stages, (num_layers, stages)
    costs = [block] * stages
    costs[0] += embedding
    costs[-1] += head
    busy = [0.0] * (max(homes) + 1)
    for cost, home in zip(costs, homes, strict=True):
        busy[home] += cost
    counts = [1] * stages
    for _ in range(num_layers - stages):
        chosen = min(range(stages), key=lambda stage: (busy[homes[stage]], costs[stage]))
        costs[chosen] += block
        busy[homes[chosen]] += block
        counts[chosen] += 1
    return [range(start, stop) for start, stop in pairwise((0, *accumulate(counts)))]
