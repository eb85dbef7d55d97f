"""Packs the documents of one folder into rows of T = micro_bsz * seq_len tokens, in closed form.

    stream   | document 7 | document 2 .............. | doc 9 | ...       documents in shuffled order, end to end
    rows     |------- row 0 -------|------- row 1 -------|---- ...        cut every T tokens
    pieces   |  piece     |  piece |  piece | piece   |  ...              attention spans, at most seq_len tokens

Row r is the stream from r*T to (r+1)*T: a binary search in the cumulated lengths finds its documents, so any row can
be built at once and only two numbers per document are stored. A label is the next token of the same document,
also across the edge of a row; IGNORE at the document's end and where the next token is a prompt token.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np

from internlm_lite.batch import IGNORE
from internlm_lite.data.source import Folder
from internlm_lite.errors import DataError


class PackedFolder:
    """The rows of one folder. Row ids run from 0 to `rows`."""

    def __init__(
        self,
        folder: Folder,
        *,
        row_tokens: int,
        seq_len: int,
        vocab_size: int,
        min_length: int = 0,
        seed: int,
        one_sample: bool = False,
        keep_tail: bool = False,
    ) -> None:
        """`seed` shuffles the documents. `one_sample`: attention spans are whole windows of seq_len.
        `keep_tail`: the last, incomplete row is filled up with padding instead of dropped."""
        self.name = folder.name
        self._files, self._is_dummy = folder.files, folder.is_dummy
        self.row_tokens = row_tokens
        self._seq_len, self._vocab_size, self._one_sample = seq_len, vocab_size, one_sample
        lengths = np.concatenate([file.lengths for file in folder.files])
        self._bases = np.cumsum([0, *(len(file.lengths) for file in folder.files)]).tolist()
        self._order = np.flatnonzero(lengths >= max(1, min_length))  # documents by place in the stream
        np.random.RandomState(seed % 2**32).shuffle(self._order)
        self._ends = np.cumsum(lengths[self._order])  # [documents kept] where each ends in the stream
        self.documents, self.left_out = len(self._order), len(lengths) - len(self._order)
        self.tokens = int(self._ends[-1]) if self.documents else 0
        self.rows = -(-self.tokens // row_tokens) if keep_tail else self.tokens // row_tokens

    def fill(self, row: int, tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Write one row into three int64 [T] arrays; returns the borders of its pieces, int64 [pieces + 1].

        A row at or beyond `rows` is all padding: token 0, label IGNORE.
        Raises DataError when a token id lies outside the vocabulary.
        """
        size = self.row_tokens
        start, stop = row * size, min((row + 1) * size, self.tokens)
        if start >= stop:
            tokens[:], labels[:] = 0, IGNORE
            return self._pieces(np.array([0]), positions)
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
        return self._pieces(fragments, positions)

    def _locate(self, document: int) -> tuple[int, int]:
        """Document of the folder -> (file, document of the file)."""
        file = bisect_right(self._bases, document) - 1
        return file, document - self._bases[file]

    def _stream(self, start: int, stop: int, first: int, ends: np.ndarray) -> np.ndarray:
        """Tokens start..stop of the stream, signed, and one more if the last document goes on: int64 [T + 1]."""
        signed = np.zeros(self.row_tokens + 1, np.int64)
        begin = (int(self._ends[first - 1]) if first else 0) - start
        at, limit = 0, stop - start + 1
        for document, end in zip(self._order[first : first + len(ends)].tolist(), ends.tolist(), strict=True):
            file, local = self._locate(document)
            upto = min(end, limit)
            signed[at:upto] = self._files[file].tokens(local, at - begin, upto - begin)
            begin = at = end
        if max(int(signed.max()), -int(signed.min())) >= self._vocab_size:
            self._refuse(signed, start, first, ends)
        return signed

    def _refuse(self, signed: np.ndarray, start: int, first: int, ends: np.ndarray) -> None:
        at = int(np.flatnonzero((signed >= self._vocab_size) | (signed <= -self._vocab_size))[0])
        place = first + int(np.searchsorted(ends, at, side="right"))
        begin = int(self._ends[place - 1]) if place else 0
        file, document = self._locate(int(self._order[place]))
        raise DataError(
            f"{self._files[file].path}: document {document}, token {start + at - begin}: "
            f"found id {abs(int(signed[at]))}, "
            f"expected ids below model.vocab_size = {self._vocab_size}; these data belong to another "
            f"tokenizer: set model.vocab_size, or tokenise the folder again"
        )

    def _pieces(self, fragments: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Split fragments at seq_len; write positions inside the pieces and return the pieces' borders."""
        size = self.row_tokens
        if fragments[-1] < size:  # padding attends to itself
            fragments = np.append(fragments, size)
        if self._one_sample:
            fragments = np.array([0, size])
        lengths = np.diff(fragments)
        if int(lengths.max()) > self._seq_len:
            counts = -(-lengths // self._seq_len)  # pieces of each fragment
            within = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
            fragments = np.append(np.repeat(fragments[:-1], counts) + within * self._seq_len, size)
            lengths = np.diff(fragments)
        np.subtract(np.arange(size), np.repeat(fragments[:-1], lengths), out=positions)
        return fragments
