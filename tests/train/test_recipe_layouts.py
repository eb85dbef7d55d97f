"""Recipes, in which every pair of their parts meets, train alike in layouts: the curve of one process, in fp64."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.cross import cross_problems
from internlm_lite.config.schema import Config
from tests.corpus import write_corpus
from tests.train.layout_runs import Job, check, run_layouts
from tests.train.layouts import LIMIT, MAX_RANKS, Layout, config_of, fixed_layouts, runnable

SAMPLE = int(os.environ.get("RECIPE_RUNS", "10"))
"""`RECIPE_RUNS=60 pytest tests/train/test_recipe_layouts.py` runs all."""
RUNS = 60
STAGES = [
    {"until": 2},
    {"until": 4, "seq_len": 48, "rope_base": 5e4, "lr": 5e-3},
    {"seq_len": 16, "weights": {"code": 2.0, "docs": 1.0}},
]
_MUP = {"scaling": "mup", "mup_base_width": 16}
PARTS: dict[str, list[dict[str, Any]]] = {
    "rule": [
        {"optimizer": {"name": "adamw"}},
        {"optimizer": {"name": "adamw_cs336"}},
        {"optimizer": {"name": "adamw", "moments": "bf16"}},
        {"optimizer": {"name": "lion"}, "adam": {"lr": 1e-3}},
        {"optimizer": {"name": "sgd", "momentum": 0.9}, "adam": {"lr": 0.1}},
        {"optimizer": {"name": "muon", "update_scale": "spectral", "muon_weight_decay": 0.2}},
        {"optimizer": {"name": "muon", "nesterov": False, "muon_lr": 2e-2}},
    ],
    "groups": [{}, {"optimizer": {"groups": [{"pattern": "*norm*", "lr": 3e-3, "weight_decay": 0.0}]}}],
    "ema": [{}, {"ema": {"decay": 0.9}}, {"ema": {"decay": 0.8, "every": 2, "warmup": False}}],
    "stages": [{}, {"stages": STAGES}],
    "schedule": [
        {},
        {"lr_scheduler": {"kind": "wsd", "decay_steps": 3, "decay_shape": "exponential"}},
        {"lr_scheduler": {"kind": "inverse_sqrt"}},
        {"lr_scheduler": {"kind": "steps", "step_factors": [[3, 0.5], [4, 0.1]]}},
    ],
    "width": [{}, {"model": _MUP}],
    "loss": [{}, {"loss": {"z_loss": 0.01}, "model": {"residual_dropout": 0.1}}],
}
"""Values of the parts of a recipe: sections of a config."""

Recipe = dict[str, int]
"""Part -> number of its value."""


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, section by section."""
    deep = [key for key in above if isinstance(below.get(key), dict) and isinstance(above[key], dict)]
    return {**below, **above, **{key: merged(below[key], above[key]) for key in deep}}


def recipe_config(recipe: Recipe, layout: Layout, corpus: Path) -> Config:
    values = json.loads(config_of(layout, corpus).model_dump_json())
    for part, number in recipe.items():
        values = merged(values, PARTS[part][number])
    values["lr_scheduler"]["eta_min"] = 1e-5
    return Config.model_validate(values)


def stands(recipe: Recipe, layout: Layout) -> bool:
    """The trainer accepts it."""
    return not list(cross_problems(recipe_config(recipe, layout, Path("corpus")), layout.world))


def recipes() -> list[tuple[Recipe, Layout]]:
    """The pair of parts that has met least decides; layouts by turns."""
    dice, met = random.Random(15), dict[frozenset[tuple[str, int]], int]()
    layouts = [layout for layout in runnable(list(fixed_layouts())) if 1 < layout.world <= MAX_RANKS and not layout.fp8]
    found: list[tuple[Recipe, Layout]] = []
    while len(found) < RUNS:
        drawn = [{part: dice.randrange(len(values)) for part, values in PARTS.items()} for _ in range(30)]
        recipe = min(drawn, key=lambda one: sum(met.get(frozenset(pair), 0) for pair in combinations(one.items(), 2)))
        layout = dice.choice(layouts)
        if stands(recipe, layout):
            found.append((recipe, layout))
            for pair in combinations(recipe.items(), 2):
                met[frozenset(pair)] = met.get(frozenset(pair), 0) + 1
    return sorted(found, key=lambda run: run[1].world)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("recipes") / "corpus", documents=200)


def test_every_pair_of_values_meets() -> None:
    met = {frozenset(pair) for recipe, _ in recipes() for pair in combinations(recipe.items(), 2)}
    ends = [(part, number) for part, values in PARTS.items() for number in range(len(values))]
    missing = [pair for pair in combinations(ends, 2) if pair[0][0] != pair[1][0] and frozenset(pair) not in met]
    refused = {("rule", 4), ("rule", 6)}  # mu-P takes no SGD, and Muon with updates of the spectral scale alone
    assert [pair for pair in missing if not (refused & set(pair) and ("width", 1) in pair)] == []


@pytest.mark.parametrize("ranks", range(2, MAX_RANKS + 1))
def test_every_recipe_gives_the_curve_of_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    runs = [run for run in recipes()[:: RUNS // SAMPLE] if run[1].world == ranks]
    if not runs:
        return
    jobs = [Job(layout, recipe_config(recipe, layout, corpus)) for recipe, layout in runs]
    alone = [Job(layout.same_model, recipe_config(recipe, layout.same_model, corpus)) for recipe, layout in runs]
    singles = run_layouts(alone, tmp_path / "one")
    worst = 0.0
    for (recipe, layout), seen, single in zip(runs, run_layouts(jobs, tmp_path / "layouts"), singles, strict=True):
        try:
            worst = max(worst, check(layout, seen, single[0], LIMIT))
        except AssertionError as error:
            raise AssertionError(f"recipe {recipe}") from error
    print(f"{len(runs)} recipes on {ranks} ranks, worst relative error {worst:.1e}")
