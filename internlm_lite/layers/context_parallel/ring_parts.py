"""Which tokens of one rank look at which tokens of another, as rectangles of tokens that a kernel can compute.

A rank of a context-parallel group owns spans (document, start, stop) of a packed row and stores their tokens one
behind the other. All is computed on the host, from the spans alone, so that a rank that sends keys and the one that
receives them agree about their number without a word.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

Span = tuple[int, int, int]
"""(document, start, stop): neighbouring tokens of one document, as numbers in the row."""
Range = tuple[int, int]
"""[start, stop) of the tokens that a rank stores."""


@dataclass(frozen=True)
class Part:
    """Query i of `queries` looks at key j of `keys`, or a mask lies over the two, from their last tokens as in
    flash-attn: d = (i + number of keys - number of queries) - j is at least 0 if `causal`, and at most `left`.
    Every query sees a key."""

    queries: Range
    keys: Range
    causal: bool = False
    left: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(queries, keys)"""
        return self.queries[1] - self.queries[0], self.keys[1] - self.keys[0]

    def cut(self, n: int) -> Iterator[Part]:
        """The same in parts of at most `n` queries, with the keys in their reach."""
        size, seen = self.shape
        for first in range(0, size, n):
            last = min(first + n, size)
            start = 0 if self.left is None else max(0, first + seen - size - self.left)
            stop = seen - size + last if self.causal else seen
            moved = 0 if self.causal or self.left is None else size - last
            left = None if self.left is None else self.left + moved
            rows, keys = self.queries[0], self.keys[0]
            yield Part((rows + first, rows + last), (keys + start, keys + stop), self.causal, left)


@dataclass(frozen=True)
class _Stored:
    """A piece, and where its rank stores it."""

    start: int
    stop: int
    at: int

    @property
    def range(self) -> Range:
        return self.at, self.at + self.stop - self.start


def _by_document(spans: Sequence[Span]) -> dict[int, list[_Stored]]:
    found: dict[int, list[_Stored]] = {}
    at = 0
    for document, start, stop in spans:
        found.setdefault(document, []).append(_Stored(start, stop, at))
        at += stop - start
    return found


def parts_between(queries: Sequence[Span], keys: Sequence[Span], window: int | None) -> tuple[Part, ...]:
    """Causal attention within documents and `window` of a rank with spans `queries` over the keys of spans `keys`,
    which are the same, or of another rank. Every pair that sees each other is in one part."""
    found: list[Part] = []
    of_keys = _by_document(keys)
    for document, asking in _by_document(queries).items():
        asked = of_keys.get(document, [])
        if not asked:
            continue
        if window is None or asking[-1].stop - asked[0].start <= window:
            found += _causal_parts(asking, asked)
        else:
            starts, stops = [k.start for k in asked], [k.stop for k in asked]
            for q in asking:
                in_reach = slice(bisect_right(stops, q.start - window + 1), bisect_right(starts, q.start))
                found += [part for k in asked[in_reach] for part in _windowed(q, k, window)]
    return tuple(found)


def _causal_parts(asking: list[_Stored], asked: list[_Stored]) -> list[Part]:
    if asking == asked:
        whole = asking[0].at, asking[-1].range[1]
        return [Part(whole, whole, causal=True)]
    found: list[Part] = []
    stops = [k.stop for k in asked]
    for q in asking:
        before = bisect_right(stops, q.start)
        if not before:
            continue
        seen = asked[0].at, asked[before - 1].range[1]
        if found and found[-1].keys == seen:  # the other rank has nothing between the two
            found[-1] = replace(found[-1], queries=(found[-1].queries[0], q.range[1]))
        else:
            found.append(Part(q.range, seen))
    return found


def _windowed(q: _Stored, k: _Stored, window: int) -> Iterator[Part]:
    """At most one part: of the queries that see the last key, and the keys that the first query sees."""
    if k.start == q.start:
        yield Part(q.range, k.range, causal=True, left=None if q.stop - q.start <= window else window - 1)
    last, first = min(q.stop, k.stop + window - 1), max(k.start, q.start - window + 1)
    if k.stop <= q.start < last and first < k.stop:
        reaches_all = last - 1 - first < window
        yield Part(
            (q.at, q.at + last - q.start),
            (k.at + first - k.start, k.range[1]),
            left=None if reaches_all else window - 1 - (last - k.stop),
        )


def seen_keys(parts: Sequence[Part]) -> tuple[Range, ...]:
    """The keys that some query sees, as ascending ranges that do not touch."""
    found: list[Range] = []
    for start, stop in sorted(part.keys for part in parts):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def over_seen(parts: Sequence[Part]) -> tuple[Part, ...]:
    """`parts` over `seen_keys` stored one behind the other."""
    moves: list[tuple[int, int]] = []  # (first key of a range, where it is stored now)
    at = 0
    for start, stop in seen_keys(parts):
        moves.append((start, at))
        at += stop - start

    def moved(part: Part) -> Part:
        start, at = max(move for move in moves if move[0] <= part.keys[0])
        return replace(part, keys=(part.keys[0] - start + at, part.keys[1] - start + at))

    return tuple(moved(part) for part in parts)


def length(ranges: Sequence[Range]) -> int:
    """Tokens of the ranges."""
    return sum(stop - start for start, stop in ranges)


@dataclass(frozen=True)
class Leg:
    """One exchange of a rank: keys and values of its tokens `sent` go to group rank `to`, while those of group rank
    `source` come, over which it computes `parts`. In the backward pass their gradients go the other way."""

    to: int
    sent: tuple[Range, ...]
    source: int
    tokens: tuple[Range, ...]
    """What comes, as ranges of the tokens that `source` stores."""
    parts: tuple[Part, ...]


def legs_of(spans: Sequence[Sequence[Span]], rank: int, window: int | None) -> tuple[Leg, ...]:
    """What `rank` exchanges, by distance in the ring: first with its neighbours, at last with those before last.
    `spans`: of every rank. No exchange is left out, also if this rank has no part in it: ranks that start later ones
    earlier than others would put gradients in the place of keys."""
    legs = []
    for distance in range(1, len(spans)):
        to, source = (rank + distance) % len(spans), (rank - distance) % len(spans)
        parts = parts_between(spans[rank], spans[source], window)
        sent = seen_keys(parts_between(spans[to], spans[rank], window))
        legs.append(Leg(to, sent, source, seen_keys(parts), over_seen(parts)))
    return tuple(legs)
