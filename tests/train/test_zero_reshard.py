"""What one stage of ZeRO saves, any other loads bit by bit, in other layouts, and goes on; in its own to the bit."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest

from internlm_lite.config.schema import Config
from tests.corpus import write_corpus
from tests.train.layouts import LIMIT, Layout
from tests.train.test_reshard import SAVED, assert_same, job, run_all
from tests.train.zero_runs import ZeroLayout

SHARE = int(os.environ.get("ZERO_RESHARD_SHARE", "3"))
"""One pair in so many; `ZERO_RESHARD_SHARE=1` looks at all."""
LAYOUTS = {
    "stage 1": ZeroLayout(Layout(dp=2, rows=12)),
    "stage 1 tp": ZeroLayout(Layout(tp=2, split_hidden=False, rows=12)),
    "stage 2": ZeroLayout(Layout(dp=4, zero1=2, bucket=1500, rows=12), 2),
    "stage 2 pp": ZeroLayout(Layout(dp=2, pp=2, rows=12), 2),
    "stage 3": ZeroLayout(Layout(dp=4, rows=12), 3),
    "stage 3 tp sp": ZeroLayout(Layout(dp=2, tp=2, sp=True, split_hidden=False, bucket=1500, rows=12), 3),
    "stage 3 of three": ZeroLayout(Layout(dp=3, rows=12), 3),  # shards of sizes that no power of two divides
}


def config_of(made: ZeroLayout, tied: bool, corpus: Path, saves: Path, source: str | None) -> Config:
    config = job(made.layout, tied, corpus, saves, source)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update={"zero_stage": made.stage})})


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_reshards_into_every_other_and_goes_on(tied: bool, tmp_path: Path) -> None:
    corpus, saves = write_corpus(tmp_path / "corpus", documents=200), tmp_path / "saves"
    sources = [(made.layout, config_of(made, tied, corpus, saves / name, None)) for name, made in LAYOUTS.items()]
    saved = dict(zip(LAYOUTS, run_all(sources, tmp_path / "sources"), strict=True))
    pairs = [pair for n, pair in enumerate(product(LAYOUTS, LAYOUTS)) if pair[0] == pair[1] or n % SHARE == 0]
    targets = [(LAYOUTS[other].layout, config_of(LAYOUTS[other], tied, corpus, saves, name)) for name, other in pairs]
    for (name, other), (tensors, went_on) in zip(pairs, run_all(targets, tmp_path / "targets"), strict=True):
        held, whole_curve = saved[name]
        assert_same(tensors, held)
        if name == other:
            assert went_on == whole_curve[SAVED:], name
        else:
            for ours, expected in zip(went_on, whole_curve[SAVED:], strict=True):
                assert ours == pytest.approx(expected, rel=LIMIT), (name, other)
