"""ZeRO stages 2 and 3 train as one process does, in layouts in which every pair of options meets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.train.layouts import Layout
from tests.train.zero_runs import MOST_RANKS, OPTIONS, ZeroLayout, build, check, covering, feasible, pairs_of, run_all

SAMPLE = int(os.environ.get("ZERO_LAYOUTS", "8"))
"""`ZERO_LAYOUTS=100 pytest tests/train/test_zero_layouts.py` runs all."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("zero") / "corpus", documents=100)


def sample() -> list[ZeroLayout]:
    layouts = covering()
    few = layouts[:: -(-len(layouts) // SAMPLE)] if len(layouts) > SAMPLE else layouts
    return [build(options) for options in few]


def test_the_layouts_cover_every_pair_of_options() -> None:
    layouts = covering()
    assert all(map(feasible, layouts)) and 20 <= len(layouts) <= 60
    covered = set().union(*map(pairs_of, layouts))
    met = {frozenset(pair) for pair in covered}
    for name, values in OPTIONS.items():
        for value in values:
            for stage in (2, 3):
                refused = stage == 3 and name == "schedule" and value is not None
                assert (frozenset({(name, value), ("stage", stage)}) in met) != refused or name == "stage", (
                    name,
                    value,
                )


@pytest.mark.parametrize("ranks", range(2, MOST_RANKS + 1))
def test_every_layout_trains_as_one_process(ranks: int, corpus: Path) -> None:
    layouts = [made for made in sample() if made.layout.world == ranks]
    if not layouts:
        return
    models = list(dict.fromkeys(made.alone for made in layouts))
    singles = dict(zip(models, run_all([(made, made.config(corpus)) for made in models]), strict=True))
    results = run_all([(made, made.config(corpus)) for made in layouts])
    worst = [check(made, ran, singles[made.alone][0]) for made, ran in zip(layouts, results, strict=True)]
    print(f"{len(layouts)} layouts on {ranks} ranks, worst relative error {max(worst):.1e}")


# A group of one rank is a group: weights come and go, and a shard is the whole.
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_has_the_same_stages(stage: int, corpus: Path) -> None:
    alone = ZeroLayout(Layout(tied=True, checkpoint=0.5, bucket=1500))
    shared = ZeroLayout(alone.layout, stage)
    (one,), (other,) = run_all([(made, made.config(corpus)) for made in (alone, shared)])
    assert check(shared, [other], one) < 1e-14
