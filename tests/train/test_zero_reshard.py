"""What one stage of ZeRO saves, any other loads bit by bit, in other layouts, and goes on; in its own to the bit."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Layout
from tests.train.test_reshard import SAVED, assert_same, job, run_all

SHARE = int(os.environ.get("ZERO_RESHARD_SHARE", "3"))
"""One pair in so many; `ZERO_RESHARD_SHARE=1` looks at all."""
LAYOUTS = {
    "stage 1": Layout(dp=2, rows=12),
    "stage 1 tp": Layout(tp=2, split_hidden=False, rows=12),
    "stage 2": Layout(dp=4, zero1=2, bucket=1500, rows=12, zero_stage=2),
    "stage 2 pp": Layout(dp=2, pp=2, rows=12, zero_stage=2),
    "stage 3": Layout(dp=4, rows=12, zero_stage=3),
    "stage 3 tp sp": Layout(dp=2, tp=2, sp=True, split_hidden=False, bucket=1500, rows=12, zero_stage=3),
    "context": Layout(dp=2, cp=2, rows=12),
    "context ring, stage 3": Layout(cp=2, exchange="ring", rows=12, zero_stage=3),
    "context Ulysses, stage 2, tp": Layout(
        tp=2, cp=2, exchange="ulysses", sp=True, split_hidden=False, rows=12, zero_stage=2
    ),
    "stage 3 of three": Layout(dp=3, rows=12, zero_stage=3),  # shards of sizes that no power of two divides
}


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_reshards_into_every_other_and_goes_on(tied: bool, tmp_path: Path) -> None:
    corpus, saves = write_corpus(tmp_path / "corpus", documents=200), tmp_path / "saves"
    sources = [(layout, job(layout, tied, corpus, saves / name, None)) for name, layout in LAYOUTS.items()]
    saved = dict(zip(LAYOUTS, run_all(sources, tmp_path / "sources"), strict=True))
    pairs = [pair for n, pair in enumerate(product(LAYOUTS, LAYOUTS)) if pair[0] == pair[1] or n % SHARE == 0]
    targets = [(LAYOUTS[other], job(LAYOUTS[other], tied, corpus, saves, name)) for name, other in pairs]
    for (name, other), (tensors, went_on) in zip(pairs, run_all(targets, tmp_path / "targets"), strict=True):
        held, whole_curve = saved[name]
        assert_same(tensors, held)
        if name == other:
            assert went_on == whole_curve[SAVED:], name
        else:
            for ours, expected in zip(went_on, whole_curve[SAVED:], strict=True):
                assert ours == pytest.approx(expected, rel=LIMIT), (name, other)
