"""Packs the documents of one folder into rows of T = micro_bsz * seq_len tokens, in closed form.

    stream   | document 7 | document 2 .............. | doc 9 | ...       documents in shuffled order, end to end
    rows     |------- row 0 -------|------- row 1 -------|---- ...        cut every T tokens
    segments |  segment   |segment |segment | segment |  ...              attention spans, at most seq_len tokens

Row r is the stream from r*T to (r+1)*T: a binary search in the cumulated lengths finds its documents, so any row can
be built directly, and only two numbers per document are stored. A label is the next token of the same document, also
across the end of a row; IGNORE at the end of the document and before a prompt token.
"""

from __future__ import annotations

from bisect import bisect_right
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from internlm_lite.batch import IGNORE
from internlm_lite.data.folders import Folder
from internlm_lite.data.unread import pieces_of
from internlm_lite.errors import DataError

MOST_SEARCHED = 1 << 24
"""Tokens read in search of a label: seconds. A few labels in so many tokens are found while training, if at all."""


@dataclass(frozen=True)
class Packing:
    """Parameters of packing."""

    row_tokens: int
    seq_len: int
    vocab_size: int
    seed: int
    """Seed of the order of the documents."""
    min_length: int = 0
    """Documents with fewer tokens are dropped."""
    one_sample: bool = False
    """Whether attention spans are whole windows of seq_len instead of documents."""
    keep_tail: bool = False
    """Whether the last, incomplete row is padded instead of dropped."""


@dataclass(frozen=True)
class Passage:
    """Tokens of a document, in a row."""

    document: int
    """Its index in the folder, over all files by name."""
    start: int
    stop: int


class PackedRows(Protocol):
    """The rows of one data folder, each by its number."""

    @property
    def name(self) -> str: ...

    @property
    def row_tokens(self) -> int: ...

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """See `PackedFolder.fill`."""

    def passages(self, row: int) -> list[Passage]:
        """What a row holds."""

    def rows_with(self, document: int) -> list[int]:
        """The rows that hold tokens of a document."""


class PackedFolder:
    """The rows of one folder, numbered from 0 to `rows`."""

    def __init__(self, folder: Folder, packing: Packing) -> None:
        self.name, self.row_tokens = folder.name, packing.row_tokens
        self._files, self._is_dummy, self._packing = folder.files, folder.is_dummy, packing
        lengths = np.concatenate([file.lengths for file in folder.files])
        self._bases = np.cumsum([0, *(len(file.lengths) for file in folder.files)]).tolist()
        self._order = np.flatnonzero(lengths >= max(1, packing.min_length))  # documents in stream order
        np.random.RandomState(packing.seed % 2**32).shuffle(self._order)
        self._ends = np.cumsum(lengths[self._order])  # [kept documents] their ends in the stream
        self._offsets: np.ndarray | None = None  # of a part: the first token of each piece in its document
        self.documents, self.dropped = len(self._order), len(lengths) - len(self._order)
        self.spans = np.array([[0, int(self._ends[-1]) if self.documents else 0]])
        """[n, 2] the ranges of the whole folder's stream that this one has, end to end."""
        self._count_rows()

    def _count_rows(self) -> None:
        self.tokens = int(self._ends[-1]) if len(self._ends) else 0
        keep_tail = self._packing.keep_tail
        self.rows = -(-self.tokens // self.row_tokens) if keep_tail else self.tokens // self.row_tokens

    def repacked(self, row_tokens: int, seq_len: int) -> PackedFolder:
        """The same stream in rows of another length; shares its arrays."""
        other = copy(self)
        other.row_tokens, other._packing = row_tokens, replace(self._packing, row_tokens=row_tokens, seq_len=seq_len)
        other._count_rows()
        return other

    def part(self, spans: np.ndarray) -> PackedFolder:
        """Rows of some ranges of this folder's stream, which is whole. Labels stay those of the whole documents."""
        part = copy(self)
        document, part._offsets, lengths = pieces_of(spans, self._ends)
        part._order, part._ends, part.spans = self._order[document], np.cumsum(lengths), spans
        part._count_rows()
        return part

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Write one row into three int64 [T] arrays; returns the boundaries of its segments, int64 [segments + 1].

        A row at or beyond `rows` is all padding: token 0, label IGNORE.
        Raises DataError when a token id lies outside the vocabulary.
        """
        size = self.row_tokens
        start, stop = row * size, min((row + 1) * size, self.tokens)
        if start >= stop:
            tokens[:], labels[:] = 0, IGNORE
            return self._segments(np.array([0]), positions)
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        ends = self._ends[first : last + 1] - start
        signed = self._stream(start, stop, first, ends)
        np.abs(signed[:size], out=tokens)
        labels[:] = signed[1:]
        if int(signed.min()) < 0:
            labels[labels < 0] = IGNORE
        if self._is_dummy:
            labels[labels == 0] = IGNORE
        labels[ends[ends <= stop - start] - 1] = IGNORE
        labels[stop - start :] = IGNORE
        if self._offsets is not None:
            for piece, end in enumerate(ends.tolist(), first):
                if end <= stop - start:
                    labels[end - 1] = self._label_after(piece)
        fragments = np.concatenate(([0], ends[:-1], [stop - start]))
        return self._segments(fragments, positions)

    @property
    def bytes_per_label(self) -> float | None:
        """UTF-8 bytes of the folder's text over its labels, by the record of its files; None if one has none."""
        records = [file.metadata for file in self._files]
        sizes = [(one.label_bytes, one.labels) for one in records if one and one.label_bytes and one.labels]
        if len(sizes) < len(records):
            return None
        return sum(n_bytes for n_bytes, _ in sizes) / sum(labels for _, labels in sizes)

    def lacks_labels(self) -> bool:
        """Whether no token is a label. Reads documents until one has a label, usually the first.

        False if none of MOST_SEARCHED tokens is: what follows is not looked at.
        """
        left = 0 if self._is_dummy else MOST_SEARCHED
        for document in self._order.tolist():
            if left <= 0:
                return False
            file, local = self._locate(document)
            tokens = self._files[file].tokens(local, 0, int(self._files[file].lengths[local]))
            if (tokens[1:] >= 0).any():
                return False
            left -= max(100, len(tokens))  # what a short one costs
        return True

    def passages(self, row: int) -> list[Passage]:
        """What a row holds, in order."""
        start, stop = row * self.row_tokens, min((row + 1) * self.row_tokens, self.tokens)
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right").tolist()
        found = []
        for piece in range(first, last + 1):
            begin, end = int(self._ends[piece - 1]) if piece else 0, int(self._ends[piece])
            shift = self._offset(piece) - begin
            found.append(Passage(int(self._order[piece]), max(start, begin) + shift, min(stop, end) + shift))
        return found

    def rows_with(self, document: int) -> list[int]:
        """The rows that hold tokens of a document, which may have been dropped."""
        found: set[int] = set()
        for piece in np.flatnonzero(self._order == document).tolist():
            begin, end = int(self._ends[piece - 1]) if piece else 0, int(self._ends[piece])
            found.update(range(begin // self.row_tokens, (end - 1) // self.row_tokens + 1))
        return sorted(row for row in found if row < self.rows)

    def file_of(self, document: int) -> tuple[Path, int]:
        """(file, index in the file) of a document. Raises IndexError if there is none of this index."""
        if not 0 <= document < self._bases[-1]:
            raise IndexError(f"{self.name} has documents 0 to {self._bases[-1] - 1}")
        file, local = self._locate(document)
        return self._files[file].path, local

    def _offset(self, piece: int) -> int:
        """The first token of a piece of the stream in its document."""
        return 0 if self._offsets is None else int(self._offsets[piece])

    def _label_after(self, piece: int) -> int:
        """The label of the last token of a piece, whose document may go on in another row."""
        file, local = self._locate(int(self._order[piece]))
        begin = int(self._ends[piece - 1]) if piece else 0
        stop = self._offset(piece) + int(self._ends[piece]) - begin
        if stop >= int(self._files[file].lengths[local]):
            return IGNORE
        label = int(self._files[file].tokens(local, stop, stop + 1)[0])
        return IGNORE if label < 0 or (self._is_dummy and label == 0) else label

    def _locate(self, document: int) -> tuple[int, int]:
        """Index of a document in the folder -> (file, index in the file)."""
        file = bisect_right(self._bases, document) - 1
        return file, document - self._bases[file]

    def _stream(self, start: int, stop: int, first: int, ends: np.ndarray) -> np.ndarray:
        """Tokens start..stop of the stream, signed, and one more if the last document continues: int64 [T + 1]."""
        signed = np.zeros(self.row_tokens + 1, np.int64)
        begin = (int(self._ends[first - 1]) if first else 0) - start
        at, limit = 0, stop - start + 1
        documents = self._order[first : first + len(ends)].tolist()
        for piece, (document, end) in enumerate(zip(documents, ends.tolist(), strict=True), first):
            file, local = self._locate(document)
            upto, begin = min(end, limit), begin - self._offset(piece)
            signed[at:upto] = self._files[file].tokens(local, at - begin, upto - begin)
            begin = at = end
        if max(int(signed.max()), -int(signed.min())) >= self._packing.vocab_size:
            self._refuse(signed, start, first, ends)
        return signed

    def _refuse(self, signed: np.ndarray, start: int, first: int, ends: np.ndarray) -> None:
        at = int(np.flatnonzero((signed >= self._packing.vocab_size) | (signed <= -self._packing.vocab_size))[0])
        index = first + int(np.searchsorted(ends, at, side="right"))
        begin = int(self._ends[index - 1]) if index else 0
        file, document = self._locate(int(self._order[index]))
        raise DataError(
            f"{self._files[file].path}: document {document}, token {start + at - begin + self._offset(index)}: "
            f"found id {abs(int(signed[at]))}, "
            f"expected ids below model.vocab_size = {self._packing.vocab_size}; these data belong to another "
            f"tokenizer: set model.vocab_size, or tokenise the folder again"
        )

    def _segments(self, fragments: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Split fragments at seq_len; write positions inside the segments and return the segments' boundaries."""
        size = self.row_tokens
        if fragments[-1] < size:  # padding attends to itself
            fragments = np.append(fragments, size)
        if self._packing.one_sample:
            fragments = np.array([0, size])
        lengths = np.diff(fragments)
        if int(lengths.max()) > self._packing.seq_len:
            counts = -(-lengths // self._packing.seq_len)  # segments of each fragment
            within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            fragments = np.append(np.repeat(fragments[:-1], counts) + within * self._packing.seq_len, size)
            lengths = np.diff(fragments)
        np.subtract(np.arange(size), np.repeat(fragments[:-1], lengths), out=positions)
        return fragments
