"""Who writes what: every element that some ranks hold is written by exactly one of them, the bytes spread evenly.

Ranks may hold the same range (replicas), or ranges of one box cut differently (a tensor that lives on two pipeline
stages): the ranges are cut where any of them begins or ends, and each part goes to its holder with the least to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from internlm_lite.checkpoint.format.boxes import Region, volume
from internlm_lite.checkpoint.format.tensor_file import DTYPE_NAMES, DTYPES
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.layout import Box, Piece


class Holding(NamedTuple):
    """A piece without its bytes: what ranks tell each other."""

    role: str
    name: str
    shape: tuple[int, ...]
    box: Box
    span: tuple[int, int]
    dtype: str


@dataclass(frozen=True)
class Share:
    """A part of this rank's piece number `index` that this rank writes, as tensor `key` of its file."""

    index: int
    key: str
    region: Region
    holding: Holding

    def of(self, piece: Piece) -> torch.Tensor:
        """The part's elements: 1-D, or of the box's shape when it is a whole box."""
        first = self.holding.span[0]
        start, stop = self.region.span
        part = piece.tensor.detach().view(-1)[start - first : stop - first]
        return part if self.region.flat else part.view([b - a for a, b in self.region.box])


def describe(piece: Piece) -> Holding:
    """Raises CheckpointError when the tensor does not have the size its region says."""
    region = Region(piece.box, piece.flat)
    if piece.tensor.numel() != region.count or not piece.tensor.is_contiguous():
        raise CheckpointError(
            f"{piece.role} of {piece.name}: a {'contiguous ' if piece.tensor.is_contiguous() else 'strided '}tensor of "
            f"{piece.tensor.numel()} elements, expected a contiguous one of {region.count} for {region}"
        )
    dtype = DTYPE_NAMES.get(piece.tensor.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{piece.role} of {piece.name}: {piece.tensor.dtype} cannot be stored; use {[*DTYPE_NAMES]}"
        )
    return Holding(piece.role, piece.name, tuple(piece.shape), piece.box, region.span, dtype)


Holder = tuple[int, int]
"""(rank, index of the piece there)"""


def share_out(every: Sequence[Sequence[Holding]]) -> list[list[Share]]:
    """What each rank writes, from what all ranks hold. Pure: the same on every rank."""
    parts = _parts(every)
    load = [0] * len(every)
    written: list[list[tuple[int, Holding, tuple[int, int]]]] = [[] for _ in every]
    # Parts with one holder first: they leave no choice. Then large before small, which evens out best.
    for size, _, span, holders in sorted(parts, key=lambda part: (len(part[3]) > 1, -part[0], part[1:])):
        rank, index = min(holders, key=lambda holder: (load[holder[0]], holder))
        load[rank] += size
        written[rank].append((index, every[rank][index], span))
    return [_named(shares) for shares in written]


def _parts(every: Sequence[Sequence[Holding]]) -> list[tuple[int, tuple[str, str, Box], tuple[int, int], list[Holder]]]:
    """(bytes, (role, name, box), span, holders) of each part, no two of one box overlapping."""
    facts: dict[tuple[str, str], tuple[tuple[int, ...], str]] = {}
    boxes: dict[tuple[str, str, Box], dict[tuple[int, int], list[Holder]]] = {}
    for rank, holdings in enumerate(every):
        for index, held in enumerate(holdings):
            known = facts.setdefault((held.role, held.name), (held.shape, held.dtype))
            if known != (held.shape, held.dtype):
                raise CheckpointError(
                    f"{held.role} of {held.name}: rank {rank} holds {held.dtype} of shape {list(held.shape)}, another "
                    f"rank {known[1]} of shape {list(known[0])}: expected the same whole tensor on all ranks"
                )
            if held.span[0] < held.span[1]:
                boxes.setdefault((held.role, held.name, held.box), {}).setdefault(held.span, []).append((rank, index))
    parts = []
    for where, spans in boxes.items():
        itemsize = DTYPES[facts[where[:2]][1]].itemsize
        parts += [((b - a) * itemsize, where, (a, b), holders) for (a, b), holders in _disjoint(spans)]
    return parts


def _disjoint(spans: dict[tuple[int, int], list[Holder]]) -> list[tuple[tuple[int, int], list[Holder]]]:
    """The spans cut at each other's ends."""
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


def _named(written: list[tuple[int, Holding, tuple[int, int]]]) -> list[Share]:
    """Shares of one rank in a stable order, with keys that are unique in its file."""
    shares: list[Share] = []
    seen: dict[str, int] = {}
    for index, held, span in sorted(written, key=lambda item: (item[1].role, item[1].name, item[1].box, item[2])):
        key = f"{held.role}/{held.name}"
        count = seen[key] = seen.get(key, 0) + 1
        region = Region(held.box, None if span == (0, volume(held.box)) else span)
        shares.append(Share(index, key if count == 1 else f"{key}#{count}", region, held))
    return shares
