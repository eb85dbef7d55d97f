"""Every value of a model's parts trains alike in all layouts: loss and gradient norm of one process, in fp64."""

from __future__ import annotations

import os
from itertools import combinations
from pathlib import Path

import pytest

from tests.corpus import write_corpus
from tests.train.family_layouts import DROPOUT, PARTS, RUNS, ends_of, family_layouts, wanted_pairs
from tests.train.layout_runs import Job, check, run_layouts, run_references
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
    models = dict.fromkeys(layout.same_model for layout in layouts)
    references = run_references([Job(model, config_of(model, corpus)) for model in models], tmp_path / "single")
    results = run_layouts([Job(layout, config_of(layout, corpus)) for layout in layouts], tmp_path / "layouts")
    worst = 0.0
    for layout, seen in zip(layouts, results, strict=True):
        worst = max(worst, check(layout, seen, references[layout.same_model], LIMIT))
    print(f"{len(layouts)} layouts on {ranks} ranks, worst relative error {worst:.1e}")
