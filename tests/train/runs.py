"""Runs of a tiny decoder for the tests of the loop: one config, small changes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.train.build import build_run
from internlm_lite.train.loop import train
from tests.steps import read_metrics

STEPS = 8


def tiny(corpus: Path | None, **sections: dict[str, Any]) -> Config:
    """4 packed rows of 2 * 32 tokens per step, grouped-query attention, everything on."""
    values: dict[str, dict[str, Any]] = {
        "ckpt": {},
        "data": {
            "seq_len": 32,
            "micro_bsz": 2,
            "micro_num": 4,
            "total_steps": STEPS,
            "train_folder": None if corpus is None else str(corpus),
        },
        "adam": {"lr": 1e-2},
        "lr_scheduler": {"total_steps": STEPS, "warmup_ratio": 0.25, "eta_min": 1e-4},
        "hybrid_zero_optimizer": {"reduce_bucket_size": 3000},
        "model": {
            "num_attention_heads": 4,
            "num_kv_attention_heads": 2,
            "hidden_size": 32,
            "num_layers": 2,
            "vocab_size": 96 if corpus else 256,
            "multiple_of": 16,
            "dtype": "torch.float64",
            "compile": False,
        },
    }
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    return Config.model_validate(values)


def run_training(mesh: Mesh, config: Config, folder: Path, resume: str = "auto") -> list[dict[str, Any]]:
    """Train to the end; the step objects of metrics.jsonl on rank 0, on other ranks nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(config, mesh, folder, resume)
    try:
        train(run, StopSignals())
    finally:
        run.checkpoints.close(wait=True)
        run.reporter.close()
    return read_metrics(folder / "metrics.jsonl") if mesh.is_main else []


def curve(metrics: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step."""
    return [(step["loss"], step["grad_norm"]["0_default"]) for step in metrics]
