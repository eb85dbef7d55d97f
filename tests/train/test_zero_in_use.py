"""Runs with ZeRO stages 2 and 3: averages, evaluations, tasks and samples say what they say in stage 1; other rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.monitor.jsonl import read_objects
from tests.corpus import write_corpus
from tests.evaluate.made_run import config_for, write_data
from tests.train.layout_runs import check_layouts_of_one_size
from tests.train.layouts import LIMIT, Layout, config_of
from tests.train.runs import curve, run_training
from tests.world import TIMEOUT, run_world

ASKED = {"tasks": ["cloze_word", "cloze_greedy"], "limit": 3, "weights": "both"}


def used(folder: Path, **parallel: Any) -> Config:
    """Everything that computes with weights besides a step."""
    return config_for(
        folder,
        parallel=parallel,
        evaluation=ASKED,
        data={"valid_every": 2, "micro_num": 2, "valid_micro_num": 1, "valid_train_batches": 1},
        ema={"decay": 0.5},
        monitor={"sample_prompts": ["The red", "The quick brown"], "sample_every": 2, "sample_tokens": 5},
        guard={"check_replicas_every": 1},
    )


def _runs(world: Mesh, data: Path, folder: Path) -> dict[str, Any]:
    found = {}
    for name, parallel in {
        "1": {},
        "2": {"zero_stage": 2},
        "3": {"zero_stage": 3},
        "3 kept": {"zero_stage": 3, "reshard_after_forward": False},
    }.items():
        mesh = build_mesh(sizes_of(world.world.size, 1, 1, -1), world.rank, world.device, TIMEOUT)
        found[name] = curve(run_training(mesh, used(data, **parallel), folder / name))
    return found


def figures(folder: Path) -> list[Any]:
    """All numbers of evaluations and tasks, in order."""
    events = [one for one in read_objects(folder / "events.jsonl") if one["event"] in ("evaluation", "tasks")]
    return [value for event in events for value in numbers(event)]


def numbers(value: Any, key: str = "") -> list[float]:
    if isinstance(value, dict):
        return [n for name, inner in value.items() for n in numbers(inner, name)]
    if isinstance(value, list):
        return [n for inner in value for n in numbers(inner)]
    return [value] if isinstance(value, int | float) and key not in ("time", "seconds", "seg") else []


def test_what_a_run_says_besides_its_steps(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    by_stage = run_world(_runs, 2, (data, tmp_path / "runs"), timeout_seconds=500)[0]
    one = tmp_path / "runs" / "1"
    texts = [sample["text"] for sample in read_objects(one / "samples.jsonl")]
    assert len(texts) == 4 and len(figures(one)) > 20
    for stage in ("2", "3", "3 kept"):
        folder = tmp_path / "runs" / stage
        for ours, expected in zip(by_stage[stage], by_stage["1"], strict=True):
            assert ours == pytest.approx(expected, rel=LIMIT)
        assert figures(folder) == pytest.approx(figures(one), rel=1e-8)
        assert [sample["text"] for sample in read_objects(folder / "samples.jsonl")] == texts


@pytest.mark.parametrize("stage", [2, 3])
def test_muon_and_other_rules_train_as_one_process(stage: int, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", documents=100)
    rules: list[dict[str, Any]] = [
        {"optimizer": {"name": "muon"}, "ema": {"every": 2}},
        {"optimizer": {"name": "lion"}, "adam": {"lr": 1e-3}},
    ]
    layouts = [
        Layout(dp=4, zero1=2, tied=True, bucket=1500, layers=2, zero_stage=stage),
        Layout(dp=2, tp=2, sp=True, layers=2, zero_stage=stage),
    ]
    for number, sections in enumerate(rules):

        def config(layout: Layout, sections: dict[str, Any] = sections) -> Config:
            return config_of(layout, corpus, **sections)

        check_layouts_of_one_size(layouts, config, LIMIT, tmp_path / str(number))
