"""The arithmetic of pieces against brute force over element numbers."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internlm_lite.checkpoint.format.regions import Region, overlaps, slabs, tiling_problems, volume
from tests.checkpoint.pieces import region_of


@st.composite
def _regions(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    box = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        box.append((start, draw(st.integers(start + 1, n))))
    size = volume(tuple(box))
    if draw(st.booleans()):
        return Region(tuple(box))
    start = draw(st.integers(0, size - 1))
    return Region(tuple(box), (start, draw(st.integers(start, size))))


@st.composite
def _two_regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region, Region]:
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=0, max_size=4)))
    stored, wanted = draw(_regions(shape)), draw(_regions(shape))
    if draw(st.booleans()) and stored.flat_range:
        wanted = Region(stored.box, wanted.flat_range if wanted.box == stored.box else None)
    return shape, stored, wanted


@settings(max_examples=300, deadline=None)
@given(_two_regions())
def test_overlaps_copy_exactly_the_shared_elements(case: tuple[tuple[int, ...], Region, Region]) -> None:
    shape, stored, wanted = case
    numbers = torch.arange(prod(shape)).view(shape)
    source, target_numbers = region_of(stored, numbers), region_of(wanted, numbers)
    target = torch.full_like(target_numbers, -1)
    written = 0
    for theirs, ours in overlaps(stored, wanted):
        first, stop = theirs.extent
        assert 0 <= first < stop <= stored.count
        ours.of(target).copy_(theirs.of(source[first:stop].clone(), first))
        written += prod(ours.size)
    shared = set(source.tolist()) & set(target_numbers.tolist())
    expected = [n if n in shared else -1 for n in target_numbers.tolist()]
    assert target.tolist() == expected
    assert written == len(shared)


@settings(max_examples=300, deadline=None)
@given(_two_regions())
def test_slabs_are_the_region_in_memory_order(case: tuple[tuple[int, ...], Region, Region]) -> None:
    shape, region, _ = case
    numbers = torch.arange(prod(shape)).view(shape)
    parts = slabs(region)
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    joined = [n for slab in parts for n in region_of(Region(slab.box), numbers).tolist()]
    assert joined == region_of(region, numbers).tolist()


@st.composite
def _some_pieces(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region]]:
    """A tiling by splits of random boxes and ranges, sometimes spoilt."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    parts = [Region(tuple((0, n) for n in shape))]
    for _ in range(draw(st.integers(0, 5))):
        region = parts.pop(draw(st.integers(0, len(parts) - 1)))
        dim = draw(st.integers(0, len(shape)))
        if dim < len(shape) and region.flat_range is None and region.box[dim][1] - region.box[dim][0] > 1:
            start, stop = region.box[dim]
            cut = draw(st.integers(start + 1, stop - 1))
            halves = [(start, cut), (cut, stop)]
            parts += [Region((*region.box[:dim], half, *region.box[dim + 1 :])) for half in halves]
        elif region.count > 1:
            start, stop = region.span
            cut = draw(st.integers(start + 1, stop - 1))
            parts += [Region(region.box, (start, cut)), Region(region.box, (cut, stop))]
        else:
            parts.append(region)
    spoil = draw(st.sampled_from(["no", "no", "drop", "double", "extra"]))
    if spoil == "drop":
        parts.pop(draw(st.integers(0, len(parts) - 1)))
    elif spoil == "double":
        parts.append(draw(st.sampled_from(parts)))
    elif spoil == "extra":
        parts.append(draw(_regions(shape).filter(lambda region: region.count > 0)))
    return shape, draw(st.permutations(parts))


@settings(max_examples=300, deadline=None)
@given(_some_pieces())
def test_tiling_problems_are_found_exactly_when_there_are_some(case: tuple[tuple[int, ...], list[Region]]) -> None:
    shape, parts = case
    numbers = torch.arange(prod(shape)).view(shape)
    held = [n for region in parts for n in region_of(region, numbers).tolist()]
    exact = sorted(held) == list(range(prod(shape)))
    problems = tiling_problems(shape, [(f"p{i}", region) for i, region in enumerate(parts)])
    assert (not problems) == exact, problems


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([("a", Region(((0, 4), (0, 2))))], ["gap", "8 of 16", "[0:4, 2:4]"]),
        ([("a", Region(((0, 4), (0, 4)))), ("b", Region(((2, 3), (0, 4))))], ["a", "b", "overlap"]),
        (
            [("a", Region(((0, 4), (0, 4)), (0, 9))), ("b", Region(((0, 4), (0, 4)), (7, 16)))],
            ["a and b overlap in [0:4, 0:4] elements 7:9"],
        ),
        ([("a", Region(((0, 5), (0, 4))))], ["a", "does not lie inside shape [4, 4]"]),
        ([("a", Region(((0, 4), (0, 4)), (3, 17)))], ["no such range"]),
        ([("a", Region(((0, 4),)))], ["does not lie inside"]),
    ],
)
def test_tiling_problems_name_the_pieces(pieces: list[tuple[str, Region]], words: list[str]) -> None:
    text = "\n".join(tiling_problems((4, 4), pieces))
    assert all(word in text for word in words), text


def test_common_cases_are_few_copies() -> None:
    box = ((0, 4096), (0, 4096))
    same = Region(box)
    assert len(overlaps(same, same)) == 1
    assert len(overlaps(same, Region(box, (100, 9_000_000)))) == 1
    columns = Region(((0, 4096), (1024, 2048)))
    ((source, target),) = overlaps(same, columns)
    assert (source.size, source.stride) == ((4096, 1024), (4096, 1))
    assert target.extent == (0, 4096 * 1024)
