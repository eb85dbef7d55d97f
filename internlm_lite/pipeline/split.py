"""Which layers make up a stage, and which stages a pipeline rank has. Pure arithmetic, the same on every rank.

1f1b, size 4          rank 0: stage 0       rank 1: 1       rank 2: 2       rank 3: 3
interleaved, 2 chunks rank 0: stages 0, 4   rank 1: 1, 5    rank 2: 2, 6    rank 3: 3, 7
zbv, 2 chunks         rank 0: stages 0, 7   rank 1: 1, 6    rank 2: 2, 5    rank 3: 3, 4
"""

from __future__ import annotations

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


def split_layers(num_layers: int, stages: int, block: float, embedding: float, head: float) -> list[range]:
    """Contiguous layers for each stage, so that the dearest stage is as cheap as can be.

    `block`, `embedding`, `head`: cost of one layer, of what the first stage has besides, and the last. Every stage gets
    at least one layer: num_layers >= stages.
    """
    assert num_layers >= stages, (num_layers, stages)
    costs = [block] * stages
    costs[0] += embedding
    costs[-1] += head
    counts = [1] * stages
    for _ in range(num_layers - stages):
        cheapest = min(range(stages), key=costs.__getitem__)
        costs[cheapest] += block
        counts[cheapest] += 1
    return [range(start, stop) for start, stop in pairwise((0, *accumulate(counts)))]
