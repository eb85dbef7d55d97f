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
from dataclasses import dataclass

import numpy as np

from internlm_lite.batch import IGNORE
from internlm_lite.data.folders import Folder
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
        self.documents, self.dropped = len(self._order), len(lengths) - len(self._order)
        self.tokens = int(self._ends[-1]) if self.documents else 0
        self.rows = -(-self.tokens // self.row_tokens) if packing.keep_tail else self.tokens // self.row_tokens

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

    def _locate(self, document: int) -> tuple[int, int]:
        """Index of a document in the folder -> (file, index in the file)."""
        file = bisect_right(self._bases, document) - 1
        return file, document - self._bases[file]

    def _stream(self, start: int, stop: int, first: int, ends: np.ndarray) -> np.ndarray:
        """Tokens start..stop of the stream, signed, and one more if the last document continues: int64 [T + 1]."""
        signed = np.zeros(self.row_tokens + 1, np.int64)
        begin = (int(self._ends[first - 1]) if first else 0) - start
        at, limit = 0, stop - start + 1
        for document, end in zip(self._order[first : first + len(ends)].tolist(), ends.tolist(), strict=True):
            file, local = self._locate(document)
            upto = min(end, limit)
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
            f"{self._files[file].path}: document {document}, token {start + at - begin}: "
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
