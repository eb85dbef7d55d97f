"""The closed-form dummy set gives the seed's log rows exactly."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from internlm_lite.data.data_loader import open_training_data
from internlm_lite.data.dummy import DummyDocuments
from internlm_lite.data.render_batches import walk_steps
from tests.data.corpora import data_config

ROOT = Path(__file__).parents[2]
ROWS = {
    4: [
        (60571, 18, 2048, 6, 3),
        (60265, 19, 2048, 6, 3),
        (60244, 17, 2048, 5, 3),
        (60328, 17, 2048, 5, 3),
        (61028, 22, 1893, 8, 4),
        (61004, 13, 2048, 4, 3),
    ],
    8: [
        (120836, 19, 2048, 6, 3),
        (120572, 16, 2048, 5, 3),
        (122032, 16, 2048, 6, 3),
        (121125, 18, 2048, 6, 3),
        (121365, 14, 2048, 4, 3),
        (121223, 14, 2048, 4, 3),
    ],
}


@pytest.mark.parametrize("dp", [4, 8])
def test_log_rows(dp):
    config = data_config(None, seq_len=2048, micro_num=4, micro_bsz=2, min_length=50)
    data = open_training_data(config, vocab_size=103168, dp_rank=0, dp_size=dp, seed=1024)
    assert data.total_tokens == 1_212_475_002
    assert data.packed[0].rows == 296_014
    assert [dataclasses.astuple(step.figures)[1:] for step in walk_steps(data, 6)] == ROWS[dp]


def test_inspect_data_prints_the_log_rows():
    tool = [
        sys.executable,
        "tools/inspect_data.py",
        "--config",
        "configs/20B_sft.py",
        "--dp",
        "4",
        "--steps",
        "6",
        "--json",
    ]
    printed = subprocess.run(tool, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    names = ("tokens", "num_samples_in_batch", "largest_length", "largest_batch", "smallest_batch")
    assert rows == [{"step": step, **dict(zip(names, row, strict=True))} for step, row in enumerate(ROWS[4])]


@pytest.mark.parametrize("seq_len", [1, 2, 100, 2048])
def test_dummy_documents(seq_len):
    rng = np.random.RandomState(1999)
    ns, reps = rng.randint(1, 30, size=10**6), rng.randint(10, 200, size=10**6)
    documents = DummyDocuments(seq_len)
    for i, (n, rep) in enumerate(zip(ns[:50].tolist(), reps[:50].tolist(), strict=True)):
        tokens = ([n, rep] + list(range(n)) * rep)[:seq_len]
        assert documents.lengths[i] == len(tokens)
        for start, stop in ((0, len(tokens)), (1, len(tokens)), (len(tokens) // 2, len(tokens) - 1), (0, 1)):
            assert documents.tokens(i, start, max(start, stop)).tolist() == tokens[start:stop]
