"""Small training runs on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.config.schema import Config
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.train.trainer import Trainer

SHAPE = {"hidden": 128, "layers": 2, "heads": 2, "vocab": 512, "seq_len": 64, "micro_bsz": 2, "micro_num": 2}


def config_of(dtype: str, scale: float = 1024.0, **model: Any) -> Config:
    """Two layers with heads of 64. `scale`: that of an fp16 loss at the start; `model`: keys of that section."""
    config = bench_config(**SHAPE, dtype=f"torch.{dtype}", bucket_size=100_000)
    values = config.model_dump()
    values["model"].update(model)
    values["grad_scaler"] = {"fp16": {"initial_scale": scale}, "hysteresis": 1}
    return Config.model_validate(values)


def trainer_of(config: Config, device: torch.device) -> Trainer:
    return Trainer(config, single_process_mesh(device))


def losses_and_norms(trainer: Trainer, config: Config, steps: int = 4) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, on other random tokens each."""
    device, found = trainer.mesh.device, []
    for step in range(steps):
        outcome = trainer.step(random_batch(config, step, device), step)
        found.append((trainer.metrics.collect().loss, outcome.norm_model_dtype.item()))
    return found


@contextmanager
def waits_raise() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises RuntimeError."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
