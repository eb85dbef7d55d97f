"""One Slurm for all tests of a session: it starts in about a second, and looks at the end whether anything is left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.slurmlab import SlurmLab, missing_parts

CONFIG = """
JOB_NAME = "launch"
MICRO_NUM = 2
STEPS = 12
data = dict(seq_len=32, micro_bsz=2, micro_num=MICRO_NUM, total_steps=STEPS, train_folder="corpus")
lr_scheduler = dict(total_steps=STEPS)
model = dict(num_attention_heads=2, hidden_size=16, num_layers=1, vocab_size=96, multiple_of=16, dtype="torch.float64")
hybrid_zero_optimizer = dict(reduce_bucket_size=2000)
ckpt = dict(enable_save_ckpt=True, save_ckpt_folder="local:saves", checkpoint_every=100000)
"""
"""Two micro-batches on each of four ranks, eight on one: the same global batch."""


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmLab]:
    if missing := missing_parts():
        pytest.skip(missing)
    with SlurmLab(nodes=2, cpus=4) as lab:
        python = str(Path(sys.executable).parent)
        lab.environment |= {"PATH": f"{python}:{lab.environment['PATH']}", "OMP_NUM_THREADS": "1"}
        yield lab


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_corpus(tmp_path / "corpus")
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path
