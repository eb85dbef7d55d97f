"""Small tokenised folders for tests, and the packing written as one would on paper, with lists of tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from internlm_lite.batch import IGNORE
from internlm_lite.config.schema import DataConfig
from internlm_lite.data.megatron import writing

Documents = Sequence[Sequence[int]]


def write_native(bin_path: Path, documents: Documents, dtype: type = np.int32) -> Path:
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    with writing(bin_path, np.dtype(dtype)) as writer:
        for tokens in documents:
            writer.add(np.array(tokens, dtype=np.int64))
    return bin_path


def write_internlm(bin_path: Path, documents: Documents) -> Path:
    bin_path.parent.mkdir(parents=True, exist_ok=True)
    offset, meta = 0, []
    with bin_path.open("wb") as file:
        for tokens in documents:
            meta.append((offset, len(tokens)))
            offset += file.write(json.dumps({"tokens": list(tokens)}).encode() + b"\n")
    with open(f"{bin_path}.meta", "wb") as file:
        np.save(file, np.array(meta, dtype=np.int64))
    return bin_path


def random_documents(seed: int, count: int, longest: int, vocab_size: int = 1000) -> list[list[int]]:
    rng = np.random.RandomState(seed)
    return [rng.randint(1, vocab_size, size=rng.randint(1, longest + 1)).tolist() for _ in range(count)]


def data_config(root: Path | None, **changes: object) -> DataConfig:
    values = {"seq_len": 8, "micro_bsz": 2, "micro_num": 2, "total_steps": 10}
    return DataConfig.model_validate({**values, "train_folder": None if root is None else str(root), **changes})


def reference_rows(documents: Documents, order: Sequence[int], row_tokens: int, seq_len: int, one_sample: bool) -> list:
    """Complete rows as (tokens, labels, positions, boundaries), token by token."""
    tokens, labels, fragment = [], [], []
    for place, document in enumerate(order):
        ids = documents[document]
        following = [*ids[1:], None]
        tokens += [abs(token) for token in ids]
        labels += [IGNORE if token is None or token < 0 else token for token in following]
        fragment += [place] * len(ids)
    rows = []
    for start in range(0, len(tokens) - row_tokens + 1, row_tokens):
        positions, boundaries = [], [0]
        for i in range(row_tokens):
            same = i > 0 and (one_sample or fragment[start + i] == fragment[start + i - 1])
            inside = same and positions[-1] + 1 < seq_len
            positions.append(positions[-1] + 1 if inside else 0)
            if i > 0 and not inside:
                boundaries.append(i)
        stop = start + row_tokens
        rows.append((tokens[start:stop], labels[start:stop], positions, [*boundaries, row_tokens]))
    return rows
