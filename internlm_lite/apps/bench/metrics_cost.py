"""(h) Cost of monitoring: the same training with a step line per step to every sink, and without.

Two measures. The ratio of step times of alternating turns includes everything, but its noise is about half a percent.
The share is the sum of the training thread's seconds per line and the CPU seconds of the sinks' threads, as if these
did not overlap with steps; it does not include sums on the device.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.bench.shapes import bench_config, random_batch
from internlm_lite.apps.bench.timing import alternate
from internlm_lite.batch import Batch
from internlm_lite.mesh.mesh import Mesh, single_process_mesh
from internlm_lite.monitor.metrics import FolderMetrics
from internlm_lite.monitor.sinks import SinkFactory, open_sinks
from internlm_lite.optim.step_decision import StepOutcome
from internlm_lite.runtime.device import device_name
from internlm_lite.runtime.log import FullFormatter
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer

FOLDERS = 33
"""Number of data folders, as in InternLM's demo run."""
TURN_STEPS = 5
"""Steps per turn. Threads process a line during the next step; longer turns attribute that to the right side."""


@dataclass(frozen=True)
class MetricsResult:
    """Seconds of one step, and seconds that one line adds."""

    shape: str
    device: str
    folders: int
    quiet_seconds: float
    told_seconds: float
    ratio: float
    """logged / quiet"""
    line_seconds: float
    """Seconds of the training thread per line: collect, read, pass to all sinks."""
    thread_seconds: float
    """CPU seconds of the sinks' threads per line."""
    share: float
    """(line + thread) / quiet"""


class _NoMetrics(FolderMetrics):
    def add(self, *_: torch.Tensor) -> None:
        """Ignore the values."""


def bench_metrics(
    device: torch.device, rounds: int, folder: Path, sinks: Mapping[str, SinkFactory] = {}, **shape: Any
) -> MetricsResult:
    """Measure with all sinks but wandb, and `sinks`, in `folder`; the console's step line goes to a file there."""
    with _log_to(folder / "log"):
        return _measured(device, rounds, folder, sinks, shape)


def _measured(
    device: torch.device, rounds: int, folder: Path, sinks: Mapping[str, SinkFactory], shape: Mapping[str, Any]
) -> MetricsResult:
    config = bench_config(**shape)
    mesh = single_process_mesh(device)
    trainer = Trainer(config.model_copy(update={"seed": 1}), mesh, [f"folder-{n}" for n in range(FOLDERS)])
    reporter, metrics = Reporter(config, mesh, trainer), trainer.metrics
    batch = _spread(random_batch(config, 1, device))
    reporter.open_sinks(partial(open_sinks, folder, config, sinks), 0)
    lines = _Lines(reporter, batch, mesh)
    nothing = _NoMetrics((), mesh)

    def quiet() -> None:
        trainer.metrics = nothing
        for _ in range(TURN_STEPS):
            trainer.step(batch, step=0)

    def logged() -> None:
        trainer.metrics = metrics
        lines.start()
        for _ in range(TURN_STEPS):
            lines.write(trainer.step(batch, step=0))

    try:
        logged()  # opens every sink and imports every package
        trainer.fwd_bwd_time.take()
        time.sleep(1.0)
        lines.forget()
        seconds = alternate({"quiet": quiet, "logged": logged}, rounds, device)
        line_seconds, thread_seconds = lines.per_line()
    finally:
        reporter.close()
    quiet_seconds, told_seconds = seconds["quiet"] / TURN_STEPS, seconds["logged"] / TURN_STEPS
    return MetricsResult(
        shape=", ".join(f"{key}={value}" for key, value in shape.items()),
        device=device_name(device),
        folders=FOLDERS,
        quiet_seconds=quiet_seconds,
        told_seconds=told_seconds,
        ratio=told_seconds / quiet_seconds,
        line_seconds=line_seconds,
        thread_seconds=thread_seconds,
        share=(line_seconds + thread_seconds) / quiet_seconds,
    )


class _Lines:
    """Writes step lines and sums their time."""

    def __init__(self, reporter: Reporter, batch: Batch, mesh: Mesh) -> None:
        self._reporter, self._batch, self._mesh = reporter, batch, mesh
        self._state = TrainState()
        self.forget()

    def start(self) -> None:
        self._reporter.start(self._state)

    def write(self, outcome: StepOutcome) -> None:
        self._state = self._state.after(self._batch, 1)
        if self._mesh.device.type == "cuda":
            torch.cuda.synchronize(self._mesh.device)  # waiting for the step is not part of the line
        begin = time.perf_counter()
        self._reporter.step_line(self._state, self._batch, outcome)
        self._reporter.write_lines(math.inf)
        self._seconds.append(time.perf_counter() - begin)

    def forget(self) -> None:
        self._seconds: list[float] = []
        self._thread_seconds = _thread_seconds()

    def per_line(self) -> tuple[float, float]:
        """(median seconds of the training thread, mean CPU seconds of the sinks' threads) per line."""
        return statistics.median(self._seconds), (_thread_seconds() - self._thread_seconds) / len(self._seconds)


def _thread_seconds() -> float:
    """CPU seconds of all Python threads but this one."""
    others = [thread.ident for thread in threading.enumerate() if thread is not threading.current_thread()]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in others if ident is not None)


def _spread(batch: Batch) -> Batch:
    """The same batch with its tokens distributed over all folders."""
    tokens = torch.arange(batch.folders.numel(), device=batch.folders.device, dtype=batch.folders.dtype)
    return dataclasses.replace(batch, folders=(tokens % FOLDERS).view(batch.folders.shape))


@contextmanager
def _log_to(file: Path) -> Iterator[None]:
    logger = logging.getLogger("internlm_lite")
    before = logger.level, logger.propagate
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(FullFormatter())
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(before[0])
        logger.propagate = before[1]
