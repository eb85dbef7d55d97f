"""(c) The loader alone: tokens per second from files, on one core, and opening a large corpus."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from internlm_lite.batch import Position
from internlm_lite.config.schema import DataConfig
from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.megatron import writing

VOCAB = 50304
SEQ_LEN, MICRO_NUM = 4096, 4


@dataclass(frozen=True)
class LoaderResult:
    """Rows of 4096 tokens; building a batch includes reading, labels, positions, borders and statistics."""

    documents_of: int
    """Mean document length in tokens."""
    corpus_tokens: int
    open_seconds: float
    open_resident_bytes: int
    """Resident set of the process after opening."""
    tokens_per_second: float


def write_corpus(folder: Path, n_tokens: int, mean_length: int, seed: int = 0) -> None:
    """One data folder of random token ids with document lengths spread around `mean_length`."""
    rng = np.random.default_rng(seed)
    (folder / "bench").mkdir(parents=True)
    with writing(folder / "bench" / "part.bin", np.dtype(np.uint16)) as out:
        for _ in range(0, n_tokens, block := 10_000_000):
            lengths = rng.integers(mean_length // 2, 3 * mean_length // 2, size=block // mean_length)
            out.add_many(rng.integers(VOCAB, size=int(lengths.sum()), dtype=np.uint16), lengths)


def bench_loader(folder: Path, n_tokens: int, mean_length: int, n_batches: int = 300) -> LoaderResult:
    """Write a corpus under `folder`, open it, and build batches without the prefetch thread: the rate of one core."""
    write_corpus(folder, n_tokens, mean_length)
    config = DataConfig.model_validate(
        {"seq_len": SEQ_LEN, "micro_num": MICRO_NUM, "total_steps": 1, "train_folder": str(folder)}
    )
    start = time.perf_counter()
    data = open_training_data(config, VOCAB, dp_rank=0, dp_size=1, seed=1024)
    batch = data.build(Position())
    open_seconds = time.perf_counter() - start
    resident_bytes = psutil.Process().memory_info().rss
    start = time.perf_counter()
    for _ in range(n_batches):
        batch = data.build(batch.after)
    seconds = time.perf_counter() - start
    return LoaderResult(
        documents_of=mean_length,
        corpus_tokens=data.total_tokens,
        open_seconds=open_seconds,
        open_resident_bytes=resident_bytes,
        tokens_per_second=n_batches * MICRO_NUM * SEQ_LEN / seconds,
    )
