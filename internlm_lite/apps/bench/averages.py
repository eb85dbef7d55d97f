"""Cost of an average of the weights: the same training with and without its update.

Two measures. The ratio of step times of alternating turns includes everything, but its noise is about half a percent.
The share is the time of the update of the average alone, over that of a step without, as if nothing overlapped.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.bench.timing import alternate
from internlm_lite.config.schema import EmaConfig
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.optim.average import WeightAverage
from internlm_lite.runtime.device import device_name
from internlm_lite.train.trainer import Trainer

_UPDATES = 20
"""Updates of the average in a measurement."""


@dataclass(frozen=True)
class AverageCost:
    """Seconds of a step, and of one update of the average."""

    shape: str
    device: str
    parameters: int
    tokens: int
    """Of a step."""
    plain_seconds: float
    averaging_seconds: float
    """With an update of the average in every step."""
    ratio: float
    """averaging / plain"""
    update_seconds: float
    share: float
    """update / plain"""


def bench_averages(device: torch.device, rounds: int, **shape: Any) -> AverageCost:
    """Measure one process."""
    config = bench_config(**shape).model_copy(update={"ema": EmaConfig()})
    trainer = Trainer(config, single_process_mesh(device))
    average, batch = trainer.optimizer.average, random_batch(config, 1, device)
    assert average is not None, "the config asks for it"

    def step(with_average: WeightAverage | None) -> None:
        trainer.optimizer.average = with_average
        trainer.step(batch, step=0)

    seconds = alternate({"plain": partial(step, None), "averaging": partial(step, average)}, rounds, device)
    update = statistics.median(_seconds_of(average, device) for _ in range(rounds))
    return AverageCost(
        shape=", ".join(f"{key}={value}" for key, value in shape.items()),
        device=device_name(device),
        parameters=sum(bucket.numel for bucket in trainer.optimizer.buckets),
        tokens=batch.tokens.numel(),
        plain_seconds=seconds["plain"],
        averaging_seconds=seconds["averaging"],
        ratio=seconds["averaging"] / seconds["plain"],
        update_seconds=update,
        share=update / seconds["plain"],
    )


def _seconds_of(average: WeightAverage, device: torch.device) -> float:
    """Of one update."""
    updates = torch.zeros((), dtype=torch.int64, device=device)
    begin = time.perf_counter()
    for count in range(_UPDATES):
        average.after_step(count + 1, updates)
    average.wait()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - begin) / _UPDATES
