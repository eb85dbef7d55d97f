"""The built-in data set of a million documents, in closed form, without files or stored tokens.

    document i = [n, rep] + range(n) * rep, cut to seq_len      n, rep of RandomState(1999): 1..29 and 10..199

InternLM's demo logs were made with it. Label id 0 is ignored here, but not in real data.
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
