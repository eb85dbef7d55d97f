"""The built-in data sets of a million documents, in closed form, without files or stored tokens.

    document i = [n, rep] + range(n) * rep, cut to seq_len      n, rep of RandomState(1999): 1..29 and 10..199
    copied i   = [1, x, x, ...], x at random from 1 to V - 1    source and target of a pair: the copy task

InternLM's demo logs were made with the first. Label id 0 is ignored there, but not in real data. The second is that of
the annotated transformer: 0 never occurs, 1 begins every sequence.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

DOCUMENTS = 10**6


class DummyDocuments:
    """The documents of the built-in set; implements documents.Documents."""

    path = Path("built-in dummy data set")
    metadata = None

    def __init__(self, seq_len: int) -> None:
        rng = np.random.RandomState(1999)
        self._n = rng.randint(1, 30, size=DOCUMENTS)
        self._rep = rng.randint(10, 200, size=DOCUMENTS)
        self.lengths = np.minimum(2 + self._n * self._rep, seq_len)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        n, rep = self._n[document], self._rep[document]
        tokens = (np.arange(start, stop) - 2) % n
        if start < 2:
            head = np.array([n, rep])[start:stop]
            tokens[: len(head)] = head
        return tokens

    def digest(self) -> str:
        return hashlib.sha256(self.lengths.tobytes()).hexdigest()


class CopiedDocuments:
    """Sequences of `length` symbols below `vocab_size`, each of which is its own translation; implements
    documents.Documents."""

    path = Path("built-in copy task")
    metadata = None

    def __init__(self, length: int, vocab_size: int) -> None:
        self.lengths = np.full(DOCUMENTS, length, np.int64)
        self._symbols = vocab_size - 1

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        tokens = _mixed(np.arange(start, stop, dtype=np.uint64) + np.uint64(document << 32)) % np.uint64(self._symbols)
        tokens = tokens.astype(np.int64) + 1
        if start == 0:
            tokens[:1] = 1
        return tokens

    def digest(self) -> str:
        return hashlib.sha256(f"copy {self.lengths[0]} of {self._symbols}".encode()).hexdigest()


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64 -> as good as random uint64: the output function of SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
