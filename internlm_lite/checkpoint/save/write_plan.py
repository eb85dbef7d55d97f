"""Assigns every stored element to exactly one of the ranks that hold it, and balances bytes over ranks.

Ranks may hold the same range (replicas) or different ranges of one box (a tensor on two pipeline stages). Ranges are
cut wherever one of them starts or ends, and each part goes to the holder with the fewest bytes so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from internlm_lite.checkpoint.format.regions import Region, volume
from internlm_lite.checkpoint.format.shards import ShardDescriptor
from internlm_lite.checkpoint.format.tensor_file import DTYPES
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.layout import Box, LocalShard


@dataclass(frozen=True)
class WriteItem:
    """A part of this rank's shard number `index`, which it writes as tensor `key` of its file."""

    index: int
    key: str
    region: Region
    shard: ShardDescriptor

    def of(self, piece: LocalShard) -> torch.Tensor:
        """The part's elements as a view: of the box's shape if it is a whole box, else 1-D."""
        first = self.shard.flat_range[0]
        start, stop = self.region.span
        part = piece.tensor.detach().view(-1)[start - first : stop - first]
        return part if self.region.flat_range else part.view([b - a for a, b in self.region.box])


Holder = tuple[int, int]
"""(rank, index of the shard on that rank)"""


def plan_writes(every: Sequence[Sequence[ShardDescriptor]]) -> list[list[WriteItem]]:
    """What each rank writes, given the shards of all ranks. Pure; the same on every rank. Raises CheckpointError when
    ranks disagree about a tensor's shape or dtype."""
    parts = _parts(every)
    n_bytes = [0] * len(every)
    written: list[list[tuple[int, ShardDescriptor, tuple[int, int]]]] = [[] for _ in every]
    # First the parts with one holder, which leave no choice; then in order of decreasing size, for a better balance.
    for size, _, span, holders in sorted(parts, key=lambda part: (len(part[3]) > 1, -part[0], part[1:])):
        rank, index = min(holders, key=lambda holder: (n_bytes[holder[0]], holder))
        n_bytes[rank] += size
        written[rank].append((index, every[rank][index], span))
    return [_with_keys(parts) for parts in written]


def _parts(
    every: Sequence[Sequence[ShardDescriptor]],
) -> list[tuple[int, tuple[str, str, Box], tuple[int, int], list[Holder]]]:
    """(bytes, (role, name, box), span, holders) of each part; parts of one box do not overlap."""
    facts: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    boxes: dict[tuple[str, str, Box], dict[tuple[int, int], list[Holder]]] = {}
    for rank, shards in enumerate(every):
        for index, held in enumerate(shards):
            known = facts.setdefault((held.role, held.name), (held.shape, held.dtype))
            if known != (held.shape, held.dtype):
                raise CheckpointError(
                    f"{held.role} of {held.name}: rank {rank} holds {held.dtype} of shape {list(held.shape)}, another "
                    f"rank {known[1]} of shape {list(known[0])}: expected the same whole tensor on all ranks"
                )
            if held.flat_range[0] < held.flat_range[1]:
                boxes.setdefault((held.role, held.name, held.box), {}).setdefault(held.flat_range, []).append(
                    (rank, index)
                )
    parts = []
    for where, spans in boxes.items():
        itemsize = DTYPES[facts[where[:2]][1]].itemsize
        parts += [((b - a) * itemsize, where, (a, b), holders) for (a, b), holders in _disjoint(spans)]
    return parts


def _disjoint(spans: dict[tuple[int, int], list[Holder]]) -> list[tuple[tuple[int, int], list[Holder]]]:
    """(span, holders) after cutting the spans at each other's ends: disjoint, in order."""
    ordered = sorted(spans)
    if all(stop <= start for (_, stop), (start, _) in pairwise(ordered)):
        return [(span, spans[span]) for span in ordered]
    cuts = sorted({end for span in ordered for end in span})
    found = []
    for low, high in pairwise(cuts):
        holders = [holder for (a, b) in ordered if a <= low and high <= b for holder in spans[a, b]]
        if holders:
            found.append(((low, high), sorted(holders)))
    return found


def _with_keys(written: list[tuple[int, ShardDescriptor, tuple[int, int]]]) -> list[WriteItem]:
    """The items of one rank in a deterministic order, with keys that are unique in its file."""
    items: list[WriteItem] = []
    seen: dict[str, int] = {}
    for index, held, span in sorted(written, key=lambda item: (item[1].role, item[1].name, item[1].box, item[2])):
        key = f"{held.role}/{held.name}"
        count = seen[key] = seen.get(key, 0) + 1
        region = Region(held.box, None if span == (0, volume(held.box)) else span)
        items.append(WriteItem(index, key if count == 1 else f"{key}#{count}", region, held))
    return items
