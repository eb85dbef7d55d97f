"""Packs pairs into rows: targets into T = micro_bsz * seq_len tokens, and their sources, in the same order, into
S = micro_bsz * source_seq_len.

    targets | pair 7 | pair 2 ... | pair 9 | filling |     the decoder's input, begin mark first; label: the next token
    sources | pair 7 ...... | pair 2 | pair 9 |  fill |    as many documents as in the row of targets

A pair is never cut at the end of a row: the next begins with the first pair for which a side has no room. Filling
is cut into documents of at most seq_len and source_seq_len tokens; one of them may be empty on one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np

from internlm_lite.batch import IGNORE
from internlm_lite.data.documents import Documents
from internlm_lite.data.folders import Folder
from internlm_lite.data.pack import PackedFolder, Packing, Passage
from internlm_lite.errors import DataError


@dataclass(frozen=True)
class PairPacking(Packing):
    """Parameters of packing pairs; `min_length` is about targets, marks included."""

    source_row_tokens: int = 1
    source_seq_len: int = 1
    source_vocab_size: int = 1
    row_pairs: int | None = None
    """Most pairs of a row; None: as many as fit."""
    truncate: bool = False
    """Whether sides that are too long are cut, and keep their end mark, instead of refused."""


class PackedPairs(PackedFolder):
    """The rows of one folder of pairs. Every pair is in one row; rows after the last one are filling alone."""

    _packing: PairPacking

    def __init__(self, folder: Folder, packing: PairPacking) -> None:
        self._sources, self.source_row_tokens = folder.sources, packing.source_row_tokens
        super().__init__(folder, packing)

    def _count_rows(self) -> None:
        packing = self._packing
        of_targets, of_sources = (
            np.concatenate([file.lengths for file in files])[self._order] for files in (self._files, self._sources)
        )
        self._refuse_empty(of_targets, 2, self._files)
        self._refuse_empty(of_sources, 1, self._sources)
        if not packing.truncate:
            self._refuse_longer(of_targets - 1, packing.seq_len, self._files, "data.seq_len")
            self._refuse_longer(of_sources, packing.source_seq_len, self._sources, "data.source_seq_len")
        self._lengths = np.minimum(of_targets - 1, packing.seq_len), np.minimum(of_sources, packing.source_seq_len)
        self.cut = int(np.sum((of_targets - 1 > packing.seq_len) | (of_sources > packing.source_seq_len)))
        """Pairs of which a side is cut."""
        self._begins = _first_pairs(self._lengths, (self.row_tokens, packing.source_row_tokens), packing.row_pairs)
        self._set_rows(len(self._begins) - 1)

    def _set_rows(self, rows: int) -> None:
        self.rows, self.tokens = rows, rows * self.row_tokens
        self.spans = np.array([[0, self.tokens]])

    def with_empty_rows(self, count: int) -> PackedPairs:
        """The same rows and `count` more without pairs, so that an epoch may be whole batches."""
        other = copy(self)
        other._begins = np.append(self._begins, np.repeat(self._begins[-1:], count))
        other._set_rows(self.rows + count)
        return other

    def repacked(self, row_tokens: int, seq_len: int) -> PackedPairs:
        """This one: all stages of a run with pairs have the same rows (config/pair_checks.py)."""
        assert (row_tokens, seq_len) == (self.row_tokens, self._packing.seq_len), "checked with the config"
        return self

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `PackedFolder.fill`; a row of targets."""
        tokens[:], labels[:], at, size = 0, IGNORE, 0, self._packing.seq_len
        for pair in self._pairs(row):
            ids = self._tokens(self._files, pair, size + 1, self._packing.vocab_size, "model.vocab_size")
            stop = at + len(ids) - 1
            tokens[at:stop], labels[at:stop] = ids[:-1], ids[1:]
            at = stop
        return self._boundaries(row, positions)[0]

    def fill_source(self, row: int, tokens: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Write a row of sources into two int64 [S] arrays; returns as many boundaries as `fill`, int64."""
        tokens[:], at, packing = 0, 0, self._packing
        for pair in self._pairs(row):
            size, most = packing.source_seq_len, packing.source_vocab_size
            ids = self._tokens(self._sources, pair, size, most, "model.source_vocab_size")
            tokens[at : at + len(ids)] = ids
            at += len(ids)
        return self._boundaries(row, positions, source=True)[1]

    def passages(self, row: int) -> list[Passage]:
        """What a row of targets holds, in order."""
        lengths = self._lengths[0]
        return [Passage(int(self._order[pair]), 0, int(lengths[pair])) for pair in self._pairs(row)]

    def rows_with(self, document: int) -> list[int]:
        """The rows that hold a pair, which may have been dropped: at most one."""
        pairs = np.flatnonzero(self._order == document)
        return (np.searchsorted(self._begins, pairs, side="right") - 1).tolist()

    def _pairs(self, row: int) -> range:
        return range(*self._begins[row : row + 2].tolist()) if row < self.rows else range(0)

    def _tokens(self, files: Sequence[Documents], pair: int, most: int, vocab_size: int, key: str) -> np.ndarray:
        """All tokens of a side of a pair; of more than `most` the first ones, and the end mark."""
        file, document = self._locate(int(self._order[pair]))
        length = int(files[file].lengths[document])
        ids = files[file].tokens(document, 0, min(length, most)).astype(np.int64)
        if length > most:
            ids[-1] = files[file].tokens(document, length - 1, length)[0]
        if int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            raise DataError(
                f"{files[file].path}: document {document}, token {at}: found id {ids[at]}, expected ids from 0 to "
                f"below {key} = {vocab_size}; these data belong to another tokenizer: set {key}, or tokenise the "
                "folder again"
            )
        return ids

    def _boundaries(self, row: int, positions: np.ndarray, *, source: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Boundaries of the documents of both sides of a row; writes the positions of one."""
        pairs, packing = self._pairs(row), self._packing
        ends = [np.append(0, np.cumsum(of_side[pairs.start : pairs.stop])) for of_side in self._lengths]
        sizes, most = (self.row_tokens, packing.source_row_tokens), (packing.seq_len, packing.source_seq_len)
        count = max(-(-(size - int(end[-1])) // longest) for size, end, longest in zip(sizes, ends, most, strict=True))
        both = [
            np.append(end, np.minimum(end[-1] + longest * np.arange(1, count + 1), size))
            for size, end, longest in zip(sizes, ends, most, strict=True)
        ]
        bounds = both[source]
        np.subtract(np.arange(len(positions)), np.repeat(bounds[:-1], np.diff(bounds)), out=positions)
        return both[0], both[1]

    def _refuse_empty(self, lengths: np.ndarray, fewest: int, files: Sequence[Documents]) -> None:
        """Raises DataError if a side of a pair has no token to read: kernels take no empty document before others."""
        if len(empty := np.flatnonzero(lengths < fewest)):
            file, document = self._locate(int(self._order[empty].min()))
            raise DataError(
                f"{files[file].path}: document {document} has {files[file].lengths[document]} tokens, expected "
                f"at least {fewest}, as {len(empty)} of {len(lengths)} have not: take these pairs out of the text, and "
                "tokenise the folder again"
            )

    def _refuse_longer(self, lengths: np.ndarray, most: int, files: Sequence[Documents], key: str) -> None:
        """Raises DataError if a side of a pair has more than `most` tokens."""
        too_long = np.flatnonzero(lengths > most)
        if len(too_long):
            first = too_long[np.argmin(self._order[too_long])]
            file, document = self._locate(int(self._order[first]))
            raise DataError(
                f"{files[file].path}: document {document} (line {document + 1} of its text, if none was left out) has "
                f"{lengths[first]} tokens, expected at most {key} = {most}; {len(too_long)} of {len(lengths)} are too "
                f"long: raise {key}, cut them with data.truncate_pairs=True, or take them out of the text"
            )


def _first_pairs(lengths: tuple[np.ndarray, np.ndarray], sizes: tuple[int, int], row_pairs: int | None) -> np.ndarray:
    """[rows + 1] int64: the first pair of each row, and the number of pairs."""
    count, ends = len(lengths[0]), [np.append(0, np.cumsum(of_side)) for of_side in lengths]
    begins = [0]
    while begins[-1] < count:
        first = begins[-1]
        stops = [
            int(np.searchsorted(end, end[first] + size, side="right")) - 1
            for end, size in zip(ends, sizes, strict=True)
        ]
        begins.append(min(*stops, count, first + (row_pairs or count)))
    return np.array(begins)
