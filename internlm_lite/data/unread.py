"""Ranges of a folder's stream of documents: which part of a pass earlier stages left unread.

stream    | doc 7 | doc 2 .............. | doc 9 | ...
unread         [----------)   [------)      [------         spans: [n, 2] int64, rising, disjoint
part      |    doc 7, doc 2   doc 2         doc 9           the spans end to end, packed anew
"""

from __future__ import annotations

import numpy as np


def unread_spans(rows: np.ndarray, row_tokens: int, tokens: int) -> np.ndarray:
    """Of rows (rising) that were not read, and of the tail that fills no row: spans of a stream of `tokens` tokens."""
    tail = tokens - tokens % row_tokens
    starts = np.append(rows * row_tokens, tail)
    return _merged(np.stack((starts, np.append(starts[:-1] + row_tokens, tokens)), axis=1))


def within(inner: np.ndarray, spans: np.ndarray) -> np.ndarray:
    """Spans `inner` of the part that `spans` are end to end -> the same as spans of the stream."""
    starts = np.cumsum(np.append(0, spans[:, 1] - spans[:, 0]))
    pieces = _cut(inner, starts)
    index = np.searchsorted(starts, pieces[:, 0], side="right") - 1
    return _merged(pieces + (spans[index, 0] - starts[index])[:, None])


def pieces_of(spans: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Spans cut at the ends of documents -> for each piece: which document of the stream, the first of its tokens
    there, and how many."""
    pieces = _cut(spans, ends)
    document = np.searchsorted(ends, pieces[:, 0], side="right")
    begins = np.append(0, ends)[document]
    return document, pieces[:, 0] - begins, pieces[:, 1] - pieces[:, 0]


def _cut(spans: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The same ranges, cut at `points` (rising)."""
    borders = spans.ravel()
    points = np.unique(np.concatenate((borders, points)))
    inside = np.searchsorted(borders, points[:-1], side="right") % 2 == 1
    return np.stack((points[:-1], points[1:]), axis=1)[inside]


def _merged(spans: np.ndarray) -> np.ndarray:
    """Without empty ranges, and with those joined that touch."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    first = np.append(True, spans[1:, 0] != spans[:-1, 1])[: len(spans)]
    last = np.append(first[1:], True)[: len(spans)]
    return np.stack((spans[first, 0], spans[last, 1]), axis=1)
