"""Checks that ranks which must hold the same bits do: finds a flipped bit, a bad GPU or a lost update, and its rank.

    weights                            equal on all data-parallel ranks              between two gathers
    master weights, optimizer state    equal on the ranks of `replica`               always
    both, where tp splits nothing      equal on the tensor-parallel ranks as well
    both, of a tied weight             equal on the ranks of `ends` as well

A bit that flips in the only copy of an optimizer shard reaches the weights of all ranks: no comparison can see that.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from internlm_lite.errors import NumericsError
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.optim.buckets import BucketSpec
from internlm_lite.optim.zero import HybridZeroOptimizer

Key = tuple[object, ...]
_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ReplicaMismatch:
    """A tensor that must be equal on some ranks and is not."""

    text: str
    culprit_ranks: tuple[int, ...] = ()
    """Ranks that differ from a majority."""


def check_replicas(optimizer: HybridZeroOptimizer, mesh: Mesh, step: int) -> None:
    """Compare check sums over all ranks; weights must be current. Raises the same NumericsError on all ranks.
    Collective; waits for the device.
    """
    found = mismatches(comm.gather_objects(_sums(optimizer, mesh), mesh.world))
    if not found:
        return
    error = NumericsError(
        f"step {step}: ranks that must hold the same numbers do not: {'; '.join(each.text for each in found)}: a bit "
        "flipped, or the device computes wrong; test its host (memory, GPU), leave it out, and go on from the last "
        "checkpoint"
    )
    error.culprit_ranks = tuple(sorted({rank for each in found for rank in each.culprit_ranks}))
    raise error


def _sums(optimizer: HybridZeroOptimizer, mesh: Mesh) -> dict[Key, int]:
    """Check sums of everything this rank holds. Ranks with the same key must have the same sum."""
    sums: dict[Key, torch.Tensor] = {}
    for bucket, shards in optimizer.shards():
        holders = _holders(bucket.kind, mesh)
        weights, state = ("weights", *holders), ("optimizer state", *holders, mesh.zero.rank)
        sums[weights] = sums.get(weights, 0) + checksum([bucket.weights], mesh.device)
        sums[state] = sums.get(state, 0) + checksum(shards.values(), mesh.device)
    values: list[int] = torch.stack(list(sums.values())).tolist()
    return dict(zip(sums, values, strict=True))


def _holders(kind: BucketSpec, mesh: Mesh) -> Key:
    """Equal on two ranks exactly if their weights of this kind must be equal."""
    return None if "ends" in kind.partial_over else mesh.pp.rank, mesh.tp.rank if kind.tp_sharded else None


def mismatches(sums_of_ranks: Sequence[Mapping[Key, int]]) -> list[ReplicaMismatch]:
    """What differs, given the check sums of each rank: those under the same key must be equal."""
    seen: dict[Key, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, sums in enumerate(sums_of_ranks):
        for key, value in sums.items():
            seen[key][value].append(rank)
    found = []
    for (what, *_), by_value in seen.items():
        majority, *others = sorted(by_value.values(), key=len, reverse=True)
        odd = sorted(rank for ranks in others for rank in ranks)
        if odd and len(majority) > len(odd):
            text = f"{what} of {_ranks_text(odd)} differ from those of {len(majority)} other ranks"
            found.append(ReplicaMismatch(text, culprit_ranks=tuple(odd)))
        elif odd:
            each = " and ".join(map(_ranks_text, (majority, *others)))
            found.append(ReplicaMismatch(f"{what} of {each} differ, and no majority says which is wrong"))
    return found


def _ranks_text(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def checksum(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """int64 scalar: the sum of all elements' bits as integers, modulo 2^64. One flipped bit always changes it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        total += tensor.detach().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
    return total
