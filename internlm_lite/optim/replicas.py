"""Checks that copies of weights and state are bitwise equal: finds a flipped bit, a bad GPU or a lost update by rank.

    weights                            equal on all data-parallel ranks              while no gather is in progress
    master weights, optimizer state    equal on the ranks of `replica`               always
    both, if not split over tp         equal on the tensor-parallel ranks as well
    both, of a tied weight             equal on the ranks of `ends` as well

A flipped bit in the only copy of an optimizer shard reaches the weights of all ranks, so no comparison can find it.
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
from internlm_lite.optim.training_optimizer import TrainingOptimizer

Key = tuple[object, ...]
_AS_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ReplicaMismatch:
    """Copies of a tensor that differ."""

    text: str
    culprit_ranks: tuple[int, ...] = ()
    """Ranks that differ from the majority; empty without a majority."""


def check_replicas(optimizer: TrainingOptimizer, mesh: Mesh, step: int) -> None:
    """Raises the same NumericsError on all ranks when checksums differ; weights must be current. Collective; waits for
    the device."""
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


def _sums(optimizer: TrainingOptimizer, mesh: Mesh) -> dict[Key, int]:
    """Checksums of all weights and state of this rank; equal keys on two ranks require equal sums. Reads the device."""
    sums: dict[Key, torch.Tensor] = {}
    for bucket, shards in optimizer.shards():
        holders = _holders(bucket.kind, mesh)
        weights, state = ("weights", *holders), ("optimizer state", *holders, mesh.zero.rank)
        if bucket.has_weights:  # in ZeRO stage 3 there are none between steps
            sums[weights] = sums.get(weights, 0) + checksum([bucket.weights], mesh.device)
        sums[state] = sums.get(state, 0) + checksum(shards.values(), mesh.device)
    values: list[int] = comm.read(torch.stack(list(sums.values())))
    return dict(zip(sums, values, strict=True))


def _holders(kind: BucketSpec, mesh: Mesh) -> Key:
    """A key that is equal on two ranks if and only if their weights of this kind must be equal."""
    return None if "ends" in kind.partial_over else mesh.pp.rank, mesh.tp.rank if kind.tp_sharded else None


def mismatches(sums_of_ranks: Sequence[Mapping[Key, int]]) -> list[ReplicaMismatch]:
    """The differences between the checksums of all ranks (in rank order); sums under the same key must be equal."""
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
    """int64 device scalar: the sum of all elements' bits as integers, modulo 2^64. Every single bit flip changes it."""
    total = torch.zeros((), dtype=torch.int64, device=device)
    for tensor in tensors:
        total += tensor.detach().view(_AS_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
    return total
