"""A small run on a small corpus, for tests that launch it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.corpus import write_corpus

CONFIG = """
JOB_NAME = "launch"
MICRO_NUM = 2
STEPS = 60
data = dict(seq_len=32, micro_bsz=2, micro_num=MICRO_NUM, total_steps=STEPS, train_folder="corpus")
lr_scheduler = dict(total_steps=100000)
model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=96, multiple_of=16, dtype="torch.float64")
hybrid_zero_optimizer = dict(reduce_bucket_size=2000)
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves", checkpoint_every=100000)
"""
"""Two micro-batches on each of four ranks, eight on one: the same global batch."""


def prepare(folder: Path) -> Path:
    write_corpus(folder / "corpus")
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With config.py and its corpus."""
    return prepare(tmp_path)
