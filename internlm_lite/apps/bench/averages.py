"""Cost of an average of the weights: the same training with and without its update.

Two measures. The ratio of step times of alternating turns includes everything, but its noise is about half a percent.
The share is the work of the update of the average alone over that of a step without, as if nothing overlapped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.bench.timing import alternate
from internlm_lite.config.schema import EmaConfig
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.optim.average import WeightAverage
from internlm_lite.optim.zero import HybridZeroOptimizer
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
    plain_work: float
    """Seconds of the device for a plain step: on a CPU those of its cores."""
    update_work: float
    """Likewise, for one update of the average alone."""
    share: float
    """update_work / plain_work"""


def bench_averages(device: torch.device, rounds: int, **shape: Any) -> AverageCost:
    """Measure one process."""
    config = bench_config(**shape).model_copy(update={"ema": EmaConfig()})
    trainer = Trainer(config, single_process_mesh(device))
    optimizer = cast(HybridZeroOptimizer, trainer.optimizer)
    average, batch = optimizer.average, random_batch(config, 1, device)
    assert average is not None, "the config asks for it"

    def step(with_average: WeightAverage | None) -> None:
        optimizer.average = with_average
        trainer.step(batch, step=0)

    seconds = alternate({"plain": partial(step, None), "averaging": partial(step, average)}, rounds, device)
    updates = torch.zeros((), dtype=torch.int64, device=device)

    def update() -> None:
        for count in range(_UPDATES):
            average.after_step(count + 1, updates)

    plain_work = statistics.median(_work(partial(step, None), device) for _ in range(rounds))
    update_work = statistics.median(_work(update, device) for _ in range(rounds)) / _UPDATES
    return AverageCost(
        shape=", ".join(f"{key}={value}" for key, value in shape.items()),
        device=device_name(device),
        parameters=sum(bucket.numel for bucket in optimizer.buckets),
        tokens=batch.tokens.numel(),
        plain_seconds=seconds["plain"],
        averaging_seconds=seconds["averaging"],
        ratio=seconds["averaging"] / seconds["plain"],
        plain_work=plain_work,
        update_work=update_work,
        share=update_work / plain_work,
    )


def _work(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the device; on a CPU of this process on its cores, which other work there changes little."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    begin = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin
