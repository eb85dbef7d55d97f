"""Context parallelism by a ring, and by exchanging tokens for heads: the curve of one process, in fp64."""

from __future__ import annotations

import os
import random
from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.train.family_layouts import DROPOUT, PARTS
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, MAX_RANKS, Keys, Layout, config_of, feasible, fixed_layouts, runnable

SAMPLE = int(os.environ.get("RING_RUNS", "2"))
"""`RING_RUNS=80 pytest tests/train/test_ring_layouts.py` runs all beside the chosen ones."""
RUNS = 80
SEEN: tuple[Keys, ...] = (*PARTS["window"], *PARTS["scores"][1:])
CHOSEN = runnable(
    [
        Layout(cp=2, exchange="ring", micro_bsz=2),
        Layout(cp=2, exchange="ring", keys=(*PARTS["window"][3], *DROPOUT), tied=True, checkpoint=1),
        Layout(cp=2, exchange="ulysses", keys=(*PARTS["window"][2], *DROPOUT), micro_bsz=2, checkpoint=0.5),
        Layout(cp=4, exchange="ring", keys=(*PARTS["window"][1], *PARTS["scores"][1])),
        Layout(dp=2, cp=2, exchange="ring", zero1=2, rows=6, bucket=1500),
        Layout(tp=2, cp=2, exchange="ulysses", sp=True, keys=DROPOUT),
        Layout(pp=2, cp=2, exchange="ring", schedule="zbv", chunks=2, sp=True),
        Layout(tp=2, pp=2, cp=2, exchange="ring", sp=True, keys=DROPOUT, micro_bsz=2, checkpoint=1),
        Layout(cp=8, exchange="ulysses", keys=(*PARTS["window"][3], *DROPOUT)),  # more ranks than key heads
        Layout(cp=8, exchange="ring", micro_bsz=2),
    ]
)


def layouts() -> list[Layout]:
    """Those of tests/train/layouts.py that leave ranks for a context of two or more, each with a context, in which the
    kinds, sizes and what a layer sees take turns."""
    dice, found = random.Random(16), list[Layout]()
    contexts = [*product((2, 4), ("ring", "ulysses"))]
    old = [layout for layout in fixed_layouts() if layout.world <= MAX_RANKS // 2 and not layout.fp8]
    while len(found) < RUNS:
        layout, (cp, exchange) = dice.choice(old), contexts[len(found) % len(contexts)]
        keys = dice.choice(SEEN) + (DROPOUT if dice.random() < 0.5 else ())
        made = replace(layout, cp=cp, exchange=exchange, keys=keys)
        if feasible(made) and made not in found:
            found.append(made)
    return sorted(runnable(found), key=lambda layout: layout.world)


def test_kinds_and_sizes_meet_what_they_must() -> None:
    met = Counter((layout.exchange, layout.cp) for layout in layouts())
    assert len(layouts()) == RUNS and min(met.values()) >= 15 and len(met) == 4
    assert not [layout for layout in CHOSEN if not feasible(layout)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("ring") / "corpus", documents=200)


@pytest.mark.parametrize("ranks", (2, 4, 6, 8))
def test_every_layout_gives_the_figures_and_weights_of_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    chosen = [one for one in (*CHOSEN, *layouts()[:: max(1, RUNS // SAMPLE)]) if one.world == ranks]
    if chosen:
        check_layouts_of_one_size(chosen, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)


SHARDED = [
    Layout(dp=2, cp=2, exchange="ring", checkpoint=0.5, micro_bsz=2, layers=4, bucket=1500, zero_stage=3),
    Layout(cp=4, exchange="ulysses", tied=True, layers=4, keys=DROPOUT, zero_stage=3, reshard=False),
    Layout(pp=2, cp=2, exchange="ring", layers=4, keys=PARTS["window"][2], zero_stage=2),
    Layout(tp=2, cp=2, exchange="ring", sp=True, checkpoint=1, layers=4, zero_stage=3),
]


def test_gradients_and_weights_may_be_shards_over_the_ranks_of_a_row(corpus: Path, tmp_path: Path) -> None:
    """A block that runs again in the backward pass exchanges keys once more, beside the gathers of its weights."""
    check_layouts_of_one_size(SHARDED, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)
