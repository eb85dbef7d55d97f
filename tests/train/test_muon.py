"""Muon trains alike in every layout: its matrices are whole, wherever their parts are and whoever iterates on them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.config.schema import Config
from tests.corpus import write_corpus
from tests.train.layout_runs import Job, check, run_layouts, run_references
from tests.train.layouts import LIMIT, Layout, config_of, runnable

STEPS = 20
SAMPLE = int(os.environ.get("MUON_LAYOUTS", "5"))
"""`MUON_LAYOUTS=30 pytest tests/train/test_muon.py` runs all."""
GQA = (("model.num_kv_attention_heads", 2),)
MHA = (("model.num_kv_attention_heads", 8),)
LAYOUTS = runnable(
    [
        Layout(dp=2, tp=2, sp=True, keys=GQA, bucket=1500, layers=2),
        Layout(tp=2, keys=GQA, layers=2),
        Layout(dp=2, zero1=2, layers=2),
        Layout(pp=2, tp=2, sp=True, tied=True, split_hidden=False, layers=3),
        Layout(dp=4, zero1=2, keys=GQA, bucket=3000, layers=2),
        Layout(dp=2, zero1=1, layers=2),
        Layout(dp=2, zero1=2, bucket=1500, layers=2),
        Layout(dp=4, zero1=4, layers=2),
        Layout(dp=4, zero1=1, layers=2),
        Layout(dp=3, rows=6, layers=2),  # 14 matrices for three ranks
        Layout(tp=2, layers=2),
        Layout(tp=2, sp=True, layers=2),
        Layout(tp=2, keys=MHA, layers=2),
        Layout(tp=2, keys=GQA, sp=True, layers=2),
        Layout(tp=4, layers=2),
        Layout(tp=4, sp=True, layers=2),
        Layout(tp=4, keys=MHA, layers=2),
        Layout(tp=2, qk_norm="head", bias="qkv", head_dim=6, layers=2),
        Layout(pp=2, layers=3),
        Layout(pp=2, schedule="interleaved", chunks=2, layers=5),
        Layout(pp=2, schedule="zbv", chunks=2, layers=5, bucket=1500),
        Layout(pp=2, dp=2, layers=3),
        Layout(pp=2, tied=True, layers=3),
        Layout(dp=2, tp=2, layers=2),
        Layout(dp=2, tp=2, zero1=1, keys=MHA, layers=2),
        Layout(dp=4, keys=GQA, layers=1),  # fewer matrices in some buckets than ranks
        Layout(dp=2, tp=2, split_hidden=False, overlap_grad=False, overlap_param=False, layers=2),
        Layout(tp=2, keys=(("model.mlp_type", "gelu"), ("model.mlp_bias", True)), layers=2),
    ]
)


def muon_config(layout: Layout, corpus: Path, **sections: Any) -> Config:
    adam = {"lr": 1e-2, "weight_decay": 0.1}
    dump = config_of(layout, corpus, adam=adam, optimizer={"name": "muon"}).model_dump()
    dump["data"]["total_steps"] = dump["lr_scheduler"]["total_steps"] = STEPS
    for section, changes in sections.items():
        dump[section].update(changes)
    return Config.model_validate(dump)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("layouts") / "corpus", documents=200)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_layout_trains_as_one_process(ranks: int, corpus: Path, tmp_path: Path) -> None:
    layouts = [layout for layout in LAYOUTS[:SAMPLE] if layout.world == ranks]
    if not layouts:
        return
    models = dict.fromkeys(layout.same_model for layout in layouts)
    references = run_references([Job(model, muon_config(model, corpus)) for model in models], tmp_path / "single")
    results = run_layouts([Job(layout, muon_config(layout, corpus)) for layout in layouts], tmp_path / "layouts")
    worst = 0.0
    for layout, seen in zip(layouts, results, strict=True):
        worst = max(worst, check(layout, seen, references[layout.same_model], LIMIT))
    print(f"{len(layouts)} layouts on {ranks} ranks, worst relative error {worst:.1e}")
