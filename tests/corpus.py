"""Small tokenised corpora for tests: folders of random but learnable documents in the native format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from internlm_lite.data.megatron import writing

FOLDERS = {"code": 3, "docs": 5, "books": 7}
"""Folder -> stride: each token is the previous one plus the stride, with some noise."""


def write_corpus(root: Path, documents: int = 60, vocab: int = 96, seed: int = 0) -> Path:
    """Write FOLDERS under `root`, each with `documents` documents of 8 to 60 tokens. Returns `root`."""
    rng = np.random.default_rng(seed)
    for name, stride in FOLDERS.items():
        (root / name).mkdir(parents=True)
        with writing(root / name / "part.bin", np.dtype(np.uint16)) as out:
            for _ in range(documents):
                length = int(rng.integers(8, 60))
                steps = np.where(rng.random(length) < 0.1, rng.integers(vocab, size=length), stride)
                out.add((np.cumsum(steps) % vocab).astype(np.uint16))
    return root
