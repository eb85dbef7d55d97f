"""Muon beside AdamW: the time of a step, and the steps to a validation loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.bench.shapes import bench_config
from internlm_lite.apps.bench.step import our_side
from internlm_lite.apps.bench.timing import alternate
from internlm_lite.config.schema import Config
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.models.stages import meta_model
from internlm_lite.train.build import RunServices, load_run
from internlm_lite.train.evaluation import evaluate
from internlm_lite.train.loop import train

SHAPES: dict[str, dict[str, Any]] = {
    "17M": {"hidden": 384, "layers": 6, "heads": 6, "vocab": 8192},
    "100M": {"hidden": 768, "layers": 12, "heads": 12, "vocab": 10240},
}
BATCH: dict[str, Any] = {"seq_len": 512, "micro_bsz": 2, "micro_num": 2}
RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
"""Peak learning rates of the grid, of both rules."""
SHARE = 0.75
"""Of AdamW's steps that Muon has."""


@dataclass(frozen=True)
class MuonStep:
    """Seconds are medians of one optimizer step. The iteration takes as long whatever the batch: `extra_seconds`."""

    model: str
    parameters: int
    tokens: int
    adamw_seconds: float
    muon_seconds: float
    ratio: float
    extra_seconds: float


def bench_muon(device: torch.device, rounds: int, dtype: str) -> list[MuonStep]:
    """A step of AdamW and one of Muon of each shape, by turns in one process."""
    rows, mesh = [], single_process_mesh(device)
    for model, shape in SHAPES.items():
        config = bench_config(**shape, **BATCH, dtype=dtype)
        sides = {
            name: our_side(Config.model_validate({**config.model_dump(), "optimizer": {"name": name}}), mesh, 1).step
            for name in ("adamw", "muon")
        }
        seconds = alternate(sides, rounds, device)
        rows.append(
            MuonStep(
                model=model,
                parameters=sum(param.numel() for param in meta_model(config.model).parameters()),
                tokens=config.data.micro_num * config.data.micro_bsz * config.data.seq_len,
                adamw_seconds=seconds["adamw"],
                muon_seconds=seconds["muon"],
                ratio=seconds["muon"] / seconds["adamw"],
                extra_seconds=seconds["muon"] - seconds["adamw"],
            )
        )
    return rows


@dataclass(frozen=True)
class MuonTraining:
    """A whole run, with a schedule of its own length."""

    rule: str
    steps: int
    lr: float
    validation_loss: float


def bench_training(load: Callable[[Sequence[str]], Config], steps: int, folder: Path) -> list[MuonTraining]:
    """Runs of AdamW of `steps` steps and of Muon of `SHARE` of them, on one grid of learning rates.

    `load`: the config with command-line overrides, which has the variables STEPS and LEARNING_RATE."""
    rows = []
    for rule, length in (("adamw", steps), ("muon", round(SHARE * steps))):
        for lr in RATES:
            config = load(
                [
                    f"STEPS={length}",
                    f"LEARNING_RATE={lr}",
                    f"optimizer.name={rule}",
                    f"data.valid_every={length}",
                    "ckpt.enable_save_ckpt=False",
                    "monitor.sample_every=0",
                ]
            )
            rows.append(MuonTraining(rule, length, lr, _trained(config, folder)))
    return rows


def _trained(config: Config, folder: Path) -> float:
    """Validation loss after the last step."""
    run = load_run(config, single_process_mesh(), folder, "none", RunServices())
    try:
        train(run, StopSignals())
        return evaluate(run, run.start).loss
    finally:
        run.reporter.close()
