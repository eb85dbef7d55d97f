"""Arithmetic of shards of tensors: the elements that two shards share, and whether shards tile a whole tensor.

A region is a box of the whole tensor, or a range `flat_range` of that box's elements in row-major order (ZeRO). A range
of a box consists of at most 2 * dims - 1 boxes ("slabs"), each contiguous in the shard's memory:

    . . . a a a      head: end of a row
    b b b b b b      middle: whole rows
    c c . . . .      tail: start of a row

so the elements that two shards share are a few boxes, and one strided copy transfers each box.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch

from internlm_lite.mesh.layout import Box


@dataclass(frozen=True)
class Region:
    """Elements of a whole tensor, in the order of the shard's memory; `flat_range` None: the whole box."""

    box: Box
    flat_range: tuple[int, int] | None = None

    @property
    def span(self) -> tuple[int, int]:
        """(start, stop) of the box's elements, also for a whole box."""
        return self.flat_range or (0, volume(self.box))

    @property
    def count(self) -> int:
        start, stop = self.span
        return stop - start

    def __str__(self) -> str:
        text = "[" + ", ".join(f"{start}:{stop}" for start, stop in self.box) + "]"
        return text if self.flat_range is None else f"{text} elements {self.flat_range[0]}:{self.flat_range[1]}"


@dataclass(frozen=True)
class View:
    """A box of elements in a shard's memory: arguments of `torch.as_strided`, in elements."""

    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, int]:
        """(first element, one past the last element) of the view."""
        return self.offset, self.offset + sum(
            (n - 1) * step for n, step in zip(self.size, self.stride, strict=True)
        ) + 1

    def of(self, memory: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The view of `memory`, a contiguous tensor whose first element is element `first` of the shard."""
        start = memory.storage_offset() + self.offset - first
        return memory.as_strided(self.size, self.stride, start)


@dataclass(frozen=True)
class Slab:
    """A box whose elements are contiguous in a shard's memory, starting at element `start`."""

    box: Box
    start: int


def volume(box: Box) -> int:
    """Number of elements of a box."""
    return prod(stop - start for start, stop in box)


def intersect(one: Box, other: Box) -> Box | None:
    """The intersection of two boxes, or None if it is empty."""
    shared = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def slabs(region: Region) -> list[Slab]:
    """The slabs of a region, in memory order."""
    found, start = [], 0
    for local in _cut(tuple(stop - start for start, stop in region.box), *region.span):
        box = tuple((low + a, low + b) for (low, _), (a, b) in zip(region.box, local, strict=True))
        found.append(Slab(box, start))
        start += volume(box)
    return found


def _cut(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Boxes of a tensor of this shape that contain its elements start..stop-1 in row-major order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield ((start, stop),) if shape else ()
        return
    rest = shape[1:]
    row = prod(rest)
    (first, head), (last, tail) = divmod(start, row), divmod(stop, row)
    if first == last:
        yield from (((first, first + 1), *box) for box in _cut(rest, head, tail))
        return
    if head:
        yield from (((first, first + 1), *box) for box in _cut(rest, head, row))
        first += 1
    if first < last:
        yield ((first, last), *((0, n) for n in rest))
    yield from (((last, last + 1), *box) for box in _cut(rest, 0, tail))


def overlaps(stored: Region, wanted: Region) -> list[tuple[View, View]]:
    """The shared elements, as pairs of views: (of the stored shard's memory, of the wanted shard's memory)."""
    if stored.box == wanted.box:  # fast path: two ranges of one box share one range
        (a, b), (c, d) = stored.span, wanted.span
        low, high = max(a, c), min(b, d)
        size = (high - low,)
        return [(View(low - a, size, (1,)), View(low - c, size, (1,)))] if low < high else []
    if intersect(stored.box, wanted.box) is None:
        return []
    theirs = slabs(stored)
    return [
        (_view(source, shared), _view(target, shared))
        for target in slabs(wanted)
        for source in theirs
        if (shared := intersect(source.box, target.box)) is not None
    ]


def _view(slab: Slab, part: Box) -> View:
    strides, step = [], 1
    for start, stop in reversed(slab.box):
        strides.append(step)
        step *= stop - start
    stride = tuple(reversed(strides))
    offset = slab.start + sum((p - s) * n for (p, _), (s, _), n in zip(part, slab.box, stride, strict=True))
    return View(offset, tuple(stop - start for start, stop in part), stride)


def tiling_problems(shape: tuple[int, ...], shards: Sequence[tuple[str, Region]]) -> list[str]:
    """Descriptions of gaps and overlaps; empty if the (label, region) shards cover every element exactly once."""
    whole = tuple((0, n) for n in shape)
    by_box: dict[Box, list[tuple[int, int, str]]] = {}
    for label, region in shards:
        start, stop = region.span
        if len(region.box) != len(shape) or not all(
            0 <= a < b <= n for (a, b), n in zip(region.box, shape, strict=True)
        ):
            return [f"{label} {region} does not lie inside shape {list(shape)}"]
        if not 0 <= start < stop <= volume(region.box):
            return [f"{label} {region}: no such range of a box of {volume(region.box)} elements"]
        by_box.setdefault(region.box, []).append((start, stop, label))
    problems = []
    for box, ranges in by_box.items():
        ranges.sort()
        for (_, stop, label), (start, _, next_label) in pairwise(ranges):
            if start < stop:
                problems.append(f"{label} and {next_label} overlap in {Region(box, (start, stop))}")
    problems += _overlaps_between_boxes(by_box)
    covered = sum(region.count for _, region in shards)
    if not problems and covered != volume(whole):
        gap = _first_gap(whole, [slab.box for _, region in shards for slab in slabs(region)])
        problems.append(f"gap: {covered} of {volume(whole)} elements are covered, nothing holds {Region(gap)}")
    return problems


def _overlaps_between_boxes(by_box: Mapping[Box, list[tuple[int, int, str]]]) -> Iterator[str]:
    boxes = sorted(by_box)
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            if intersect(one, other) is None:
                continue
            for a, b, label in by_box[one]:
                for c, d, other_label in by_box[other]:
                    if overlaps(Region(one, (a, b)), Region(other, (c, d))):
                        yield f"{label} {Region(one, (a, b))} and {other_label} {Region(other, (c, d))} overlap"


def _first_gap(whole: Box, covered: list[Box]) -> Box:
    """A box of `whole` that is disjoint from all boxes of `covered`; there must be one."""
    free = [whole]
    for box in covered:
        free = [rest for part in free for rest in _subtract(part, box)]
    return min(free)


def _subtract(box: Box, hole: Box) -> Iterator[Box]:
    shared = intersect(box, hole)
    if shared is None:
        yield box
        return
    for dim, ((start, stop), (low, high)) in enumerate(zip(box, shared, strict=True)):
        before, after = shared[:dim], box[dim + 1 :]
        if start < low:
            yield (*before, (start, low), *after)
        if high < stop:
            yield (*before, (high, stop), *after)
