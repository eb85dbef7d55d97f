"""Every value of a model's parts trains alike in all layouts: loss and gradient norm of one process, in fp64."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.train.family_layouts import DROPOUT, PARTS, RUNS, ends_of, family_layouts, wanted_pairs
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, MAX_RANKS, Layout, config_of, feasible, runnable

SAMPLE = int(os.environ.get("FAMILY_RUNS", "16"))
"""`FAMILY_RUNS=128 pytest tests/train/test_family_layouts.py` runs all."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("layouts") / "corpus", documents=200)


def test_every_value_of_a_part_meets_every_other_value() -> None:
    layouts = family_layouts()
    assert len(layouts) == RUNS >= 120
    assert [layout for layout in layouts if not feasible(layout)] == []
    met = {pair for layout in layouts for pair in combinations(ends_of(layout), 2)}
    assert wanted_pairs() - met == set()
    assert sum(set(layout.keys) >= set(DROPOUT) for layout in layouts) >= RUNS // 2
    assert {value for layout in layouts for value in ends_of(layout)} >= {
        (name, value) for name, values in PARTS.items() for value in values
    }


def sampled(ranks: int) -> list[Layout]:
    """The layouts on so many ranks; of the sample, which takes every n-th of all."""
    return [layout for layout in runnable(list(family_layouts()[:: RUNS // SAMPLE])) if layout.world == ranks]


@pytest.mark.parametrize("ranks", range(1, MAX_RANKS + 1))
def test_every_part_gives_the_curve_of_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layouts = sampled(ranks)
    if not layouts:
        return
    check_layouts_of_one_size(layouts, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)
