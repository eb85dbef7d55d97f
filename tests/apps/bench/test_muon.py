"""The comparison of Muon with AdamW measures what it says. No test asserts a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from internlm_lite.apps.bench import muon_cost as muon
from internlm_lite.config.schema import Config
from tests.corpus import write_corpus
from tests.train.runs import tiny


def test_steps_of_both_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "SHAPES", {"tiny": {"hidden": 32, "layers": 2, "heads": 4, "vocab": 64}})
    monkeypatch.setattr(muon, "BATCH", {"seq_len": 16, "micro_bsz": 2, "micro_num": 2})
    (row,) = muon.bench_muon(torch.device("cpu"), 1, "torch.float32")
    assert row.tokens == 64 and row.parameters == 2 * 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 128 + 2 * 32) + 32
    assert row.ratio == row.muon_seconds / row.adamw_seconds > 0


def test_runs_of_the_grid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every rule with every learning rate, Muon in three quarters of the steps; the loss is that after the last one."""
    monkeypatch.setattr(muon, "RATES", (1e-6, 1e-2))
    corpus, seen = write_corpus(tmp_path / "corpus"), []

    def load(overrides: Sequence[str]) -> Config:
        given = dict(one.split("=") for one in overrides)
        seen.append(given)
        steps = int(given["STEPS"])
        data = {"total_steps": steps, "valid_every": steps, "valid_folder": str(corpus), "valid_batches": 1}
        schedule, optimizer = {"total_steps": steps, "eta_min": 0.0}, {"name": given["optimizer.name"]}
        lr = float(given["LEARNING_RATE"])
        return tiny(corpus, data=data, lr_scheduler=schedule, optimizer=optimizer, adam={"lr": lr})

    rows = muon.bench_training(load, 8, tmp_path)
    assert [(row.rule, row.steps, row.lr) for row in rows] == [
        (rule, steps, lr) for rule, steps in (("adamw", 8), ("muon", 6)) for lr in (1e-6, 1e-2)
    ]
    assert all(given["ckpt.enable_save_ckpt"] == "False" for given in seen)
    for still, learned in (rows[:2], rows[2:]):
        assert still.validation_loss == pytest.approx(4.58, abs=0.1) and learned.validation_loss < 4.5
