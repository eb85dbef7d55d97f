"""Context parallelism: which tokens of a row a rank has, so that all have as many tokens and as much attention work.

row:    [ document A ....................... | B ... | C .......... ]     T tokens, k ranks
blocks  [  0  |  1  |  2  |  3  |  4  |  5  |  6  |  7  |  8  |  9  ]     k * m of one size, and k smaller ones
rank 0     x                       x                             x     where m does not divide T / k

A token's work is the number of keys that it sees in all layers. Blocks are dealt from the one with the most work down,
each to the rank with the least that still takes one of its size. More and smaller blocks make the ranks more alike, but
also the pieces of a document that a rank has, each of which needs the keys of the document from its beginning; so the
smallest m is taken that is close enough. (Blocks from both ends, two for each rank, as in Megatron-LM and
arXiv:2407.21783, 3.3.2, are what this gives for one document as long as the row.)

The cut is a function of document boundaries, windows and k: all ranks compute it, and no tensor is read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch

CLOSE = 1.01
"""Work of the busiest rank over the mean, at which blocks are small enough."""
FINEST = 64
"""Largest number of blocks of a rank, the small one not counted."""

Layers = Mapping[int | None, int]
"""Window (None: none) -> how many layers of the model have it."""


@dataclass(frozen=True)
class DocumentPiece:
    """Neighbouring tokens of one document that a rank has."""

    document: int
    """Number in the row."""
    first: int
    """Number of the document's first token in the row."""
    start: int
    stop: int
    """Positions in the document, stop exclusive."""

    @property
    def length(self) -> int:
        return self.stop - self.start

    def before(self, window: int | None) -> int:
        """How many keys of the document in front of the piece its first token sees."""
        return self.start if window is None else min(self.start, window - 1)

    def pairs(self, window: int | None) -> int:
        """Pairs of a token of the piece and a key that it sees."""
        return _pairs(self.stop, window) - _pairs(self.start, window)


def _pairs(length: int, window: int | None) -> int:
    """Of the first `length` tokens of a document."""
    short = length if window is None else min(length, window)
    return short * (short + 1) // 2 + (length - short) * short


@dataclass(frozen=True)
class ContextRow:
    """One packed row of `tokens` tokens, cut over `size` ranks, as seen by `rank`."""

    pieces: tuple[tuple[DocumentPiece, ...], ...]
    """Of each rank, by ascending token. Each rank has T / size tokens."""
    rank: int
    tokens: int
    """T, of the whole row."""
    device: torch.device

    @property
    def size(self) -> int:
        return len(self.pieces)

    @cached_property
    def own(self) -> torch.Tensor:
        """[T / size] int64 on the device: numbers of this rank's tokens in the row, ascending."""
        return numbers(self.spans(self.rank), self.device)

    def spans(self, rank: int) -> list[tuple[int, int]]:
        """The tokens of a rank as few ranges (start, stop) of numbers in the row."""
        return joined([(piece.first + piece.start, piece.first + piece.stop) for piece in self.pieces[rank]])

    def cut(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The part, along `dim`, of a tensor about all tokens of the row that is about those of this rank."""
        return x if self.size == 1 else x.index_select(dim, self.own)

    def work(self, layers: Layers) -> list[int]:
        """Pairs of query and key in all layers, of each rank."""
        return [sum(_work(piece, layers) for piece in pieces) for pieces in self.pieces]


def numbers(spans: Sequence[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """The numbers in `spans`, in their order, [n] int64. Made on the device: nothing is copied to it."""
    return torch.cat([torch.arange(start, stop, device=device) for start, stop in spans])


def joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same numbers in the same order, in as few ranges as possible."""
    found: list[tuple[int, int]] = []
    for start, stop in spans:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], stop)
        else:
            found.append((start, stop))
    return found


def _work(piece: DocumentPiece, layers: Layers) -> int:
    return sum(count * piece.pairs(window) for window, count in layers.items())


def layers_by_window(windows: Sequence[int | None]) -> Layers:
    """Of the windows of all layers of the model, on whatever pipeline rank: one cut serves them all."""
    return Counter(windows)


def context_row(boundaries: Sequence[int], layers: Layers, size: int, rank: int, device: torch.device) -> ContextRow:
    """Cut a row with these document boundaries (0, document ends ..., T; repeats are documents without tokens) over
    `size` ranks, of which this is `rank`. `size` divides T."""
    assert boundaries[-1] % size == 0, "checked with the config"
    count, best = 1, _dealt(boundaries, layers, size, 1)
    unequal = imbalance(best, layers)
    while unequal > CLOSE and 2 * count <= min(FINEST, boundaries[-1] // size):
        count *= 2
        dealt = _dealt(boundaries, layers, size, count)
        if (found := imbalance(dealt, layers)) < unequal:
            best, unequal = dealt, found
    return ContextRow(best, rank, boundaries[-1], device)


def imbalance(pieces: Sequence[Sequence[DocumentPiece]], layers: Layers) -> float:
    """Attention work of the busiest rank over the mean; `pieces` of each rank."""
    work = [sum(_work(piece, layers) for piece in own) for own in pieces]
    return max(work) * len(work) / sum(work)


def _dealt(boundaries: Sequence[int], layers: Layers, size: int, count: int) -> tuple[tuple[DocumentPiece, ...], ...]:
    """The pieces of each rank, of `count` blocks of one size and a smaller one if they do not fill its share."""
    blocks = _blocks(boundaries, size, count)
    work = [sum(_work(piece, layers) for piece in block) for block in blocks]
    dealt: list[list[int]] = [[] for _ in range(size)]
    for group, places in ((range(count * size), count), (range(count * size, len(blocks)), 1)):
        load = [sum(work[number] for number in own) for own in dealt]
        free = [places] * size
        for number in sorted(group, key=lambda number: -work[number]):
            rank = min((rank for rank in range(size) if free[rank]), key=lambda rank: (load[rank], rank))
            dealt[rank].append(number)
            load[rank] += work[number]
            free[rank] -= 1
    return tuple(_merged([piece for number in sorted(own) for piece in blocks[number]]) for own in dealt)


def _blocks(boundaries: Sequence[int], size: int, count: int) -> list[list[DocumentPiece]]:
    """`count * size` blocks of equal size, then `size` smaller ones if tokens are left, each as its pieces."""
    tokens = boundaries[-1]
    block = tokens // size // count
    rest = tokens // size - block * count
    ends = [block * number for number in range(1, count * size + 1)]
    ends += [ends[-1] + rest * number for number in range(1, size + 1)] if rest else []
    blocks: list[list[DocumentPiece]] = [[] for _ in ends]
    number = 0
    for document, (first, last) in enumerate(pairwise(boundaries)):
        start = first
        while start < last:
            stop = min(last, ends[number])
            blocks[number].append(DocumentPiece(document, first, start - first, stop - first))
            number += stop == ends[number]
            start = stop
    return blocks


def _merged(pieces: list[DocumentPiece]) -> tuple[DocumentPiece, ...]:
    """Neighbours of one document as one piece."""
    found: list[DocumentPiece] = []
    for piece in pieces:
        if found and found[-1].document == piece.document and found[-1].stop == piece.start:
            found[-1] = replace(found[-1], stop=piece.stop)
        else:
            found.append(piece)
    return tuple(found)
