"""Keys of pairs, and epochs as a unit: what is refused before any data are opened."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.config.test_bad_configs import GOOD, problems

PAIRS = GOOD.replace("num_layers=4", "num_layers=4, num_encoder_layers=2")
CASES = [
    (PAIRS, "data.update(row_pairs=32, truncate_pairs=True, source_tokenizer='de.json')", None),
    (
        GOOD,
        "data['row_pairs'] = 32",
        "data.row_pairs: found 32 with model.num_encoder_layers 0, whose data are no pairs",
    ),
    (GOOD, "data['truncate_pairs'] = True", "data.truncate_pairs: found True with model.num_encoder_layers 0"),
    (PAIRS, "data['pack_sample_into_one'] = True", "found True with model.num_encoder_layers 2: a target sees its own"),
    (PAIRS, "stages = [dict(until=5), dict(lr=1e-5)]", None),
    (
        PAIRS,
        "stages = [dict(until=5), dict(seq_len=64)]",
        "stages[1].seq_len: found 64 with model.num_encoder_layers 2: stages of pairs change learning rates alone",
    ),
    (GOOD, "data['valid_every'] = 'epoch'; ckpt = dict(checkpoint_every='epoch')", None),
    (
        GOOD,
        "data.update(valid_every='epoch', skip_batches='3')",
        "data.valid_every: found \"epoch\" with data.skip_batches '3': passes of different length; give a number of",
    ),
    (
        GOOD,
        "data.update(train_folder='a', weights={'a': 1.0}); ckpt = dict(checkpoint_every='epoch')",
        'ckpt.checkpoint_every: found "epoch" with data.weights, with which each folder has passes of its own',
    ),
]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("config", "line", "found"), CASES, ids=[line for _, line, _ in CASES])
def test_pairs_and_epochs(config: str, line: str, found: str | None) -> None:
    told = problems(f"{config}{line}\n")
    assert len(told) == (found is not None), told
    assert found is None or found in told[0]
