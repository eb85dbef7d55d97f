"""Ranks that must hold the same bits do: a flipped bit, a bad GPU or a lost update shows, and is named.

    weights                 equal on all data-parallel ranks            between two gathers
    master weights, moments equal on the ranks of `replica`             always

A bit that flips in the only copy of an optimizer shard spreads to all weights alike: no comparison can see that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch

from internlm_lite.errors import NumericsError
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.zero import HybridZeroOptimizer

Key = tuple[object, ...]
_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_replicas(optimizer: HybridZeroOptimizer, mesh: Mesh, step: int) -> None:
    """Compare check sums over the job; weights must be current. Raises NumericsError on all ranks alike. Collective;
    waits for the device.
    """
    weights = checksum((bucket.weights for bucket in optimizer.buckets), mesh.device)
    state = checksum((piece.tensor for piece in optimizer.pieces()), mesh.device)
    here: dict[Key, int] = {
        ("weights", mesh.pp.rank, mesh.tp.rank): int(weights.item()),
        ("optimizer state", mesh.pp.rank, mesh.tp.rank, mesh.zero.rank): int(state.item()),
    }
    told: list[object] = comm.gather_objects(here, mesh.world)
    problems = differing([dict(theirs) for theirs in told if isinstance(theirs, dict)])
    if problems:
        raise NumericsError(
            f"step {step}: ranks that must hold the same numbers do not: {'; '.join(problems)}: a bit flipped, or the "
            "device computes wrong; test its host (memory, GPU), leave it out, and go on from the last checkpoint"
        )


def differing(told: Sequence[Mapping[Key, int]]) -> list[str]:
    """What differs, given each rank's check sums; keys that are equal name what must be."""
    seen: dict[Key, dict[int, int]] = defaultdict(dict)
    for rank, sums in enumerate(told):
        for key, value in sums.items():
            seen[key][rank] = value
    problems = []
    for (what, *_), by_rank in seen.items():
        (usual, count), *_others = Counter(by_rank.values()).most_common()
        odd = [rank for rank, value in by_rank.items() if value != usual]
        if odd and count > len(by_rank) / 2:
            problems.append(f"{what} of rank {', '.join(map(str, odd))} differ from those of {count} other ranks")
        elif odd:
            named = ", ".join(map(str, by_rank))
            problems.append(f"{what} of ranks {named} differ, and no majority says which is wrong")
    return problems


def checksum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 scalar: the sum of all elements' bits as integers, modulo 2^64. One flipped bit always changes it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        total += tensor.detach().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
    return total
