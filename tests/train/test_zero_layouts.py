"""ZeRO stages 2 and 3 train as one process does, in layouts in which every pair of options meets."""

from __future__ import annotations

import os
import random
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.corpus import write_corpus
from tests.torches import HAS_ZBV
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, MAX_RANKS, Layout, config_of, feasible

SAMPLE = int(os.environ.get("ZERO_LAYOUTS", "8"))
"""`ZERO_LAYOUTS=100 pytest tests/train/test_zero_layouts.py` runs all."""
OPTIONS: dict[str, tuple[Any, ...]] = {
    "dp": (2, 4, 8, 3),
    "tp": (1, 2),
    "pp": (1, 2),
    "schedule": (None, "interleaved", *["zbv"] * HAS_ZBV),
    "zero1": (-1, 1, 2),
    "rows": (8, 12),
    "tied": (False, True),
    "sp": (False, True),
    "checkpoint": (0, 0.5, 1, "selective"),
    "overlap_grad": (True, False),
    "overlap_param": (True, False),
    "bucket": (1 << 29, 1500),
    "zero_stage": (2, 3),
    "reshard": (True, False),
}


def build(options: dict[str, Any]) -> Layout:
    chunks = 1 if options["schedule"] is None else 2
    return Layout(**options, chunks=chunks, layers=4, split_hidden=not options["tied"])


def pairs_of(options: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(combinations(options.items(), 2))


def covering(seed: int = 16, drawn: int = 4000) -> list[dict[str, Any]]:
    """Of layouts drawn at random, those that meet most pairs of options not met yet, for the ranks they cost."""
    dice, candidates = random.Random(seed), list[dict[str, Any]]()
    for _ in range(drawn):
        options = {name: dice.choice(values) for name, values in OPTIONS.items()}
        if feasible(build(options)):
            candidates.append(options)
    left = set().union(*map(pairs_of, candidates))
    chosen = []
    while left:
        best = max(candidates, key=lambda one: len(pairs_of(one) & left) / build(one).world ** 0.5)
        chosen.append(best)
        left -= pairs_of(best)
    return chosen


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("zero") / "corpus", documents=200)


def sample() -> list[Layout]:
    layouts = covering()
    return [build(options) for options in layouts[:: max(1, -(-len(layouts) // SAMPLE))]]


def test_the_layouts_cover_every_pair_of_options() -> None:
    layouts = covering()
    assert 20 <= len(layouts) <= 60
    met = {frozenset(pair) for options in layouts for pair in pairs_of(options)}
    for name, values in OPTIONS.items():
        for value in values:
            for stage in (2, 3):
                refused = stage == 3 and name == "schedule" and value is not None
                seen = frozenset({(name, value), ("zero_stage", stage)}) in met
                assert seen != refused or name == "zero_stage", (name, value)


@pytest.mark.parametrize("ranks", range(2, MAX_RANKS + 1))
def test_every_layout_trains_as_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layouts = [layout for layout in sample() if layout.world == ranks]
    if layouts:
        check_layouts_of_one_size(layouts, lambda layout: config_of(layout, corpus), LIMIT, tmp_path)


# A group of one rank is a group: weights come and go, and a shard is the whole.
@pytest.mark.parametrize("stage", [2, 3])
def test_one_process_has_the_same_stages(stage: int, corpus: Path, tmp_path: Path) -> None:
    layout = Layout(tied=True, checkpoint=0.5, bucket=1500, zero_stage=stage)
    check_layouts_of_one_size([layout], lambda layout: config_of(layout, corpus), LIMIT, tmp_path)
