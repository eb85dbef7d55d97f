"""Passes rank 0's records to all sinks, such that no sink can stop or delay training.

    direct   console, files, alerts        called at once, quick
    queued   TensorBoard, wandb, MLflow    called by one daemon thread with a bounded queue; dropped when it is full

A sink that raises is reported once, in a log line and an event, and switched off.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internlm_lite.config.masking import masked
from internlm_lite.config.schema import Config
from internlm_lite.monitor.alert_monitor import AlertMonitor
from internlm_lite.monitor.console import Console
from internlm_lite.monitor.disk_usage import written_folders
from internlm_lite.monitor.jsonl import EventsFile, MetricsFile, SamplesFile, next_segment
from internlm_lite.monitor.packages import writes_tensorboard
from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord

logger = logging.getLogger("internlm_lite")

CAPACITY = 1000
"""Most records in the queue; further ones are dropped."""
CLOSE_SECONDS = 10.0
"""Longest time that `close` waits for queued sinks."""

Call = Callable[[Sink], None]
SinkFactory = Callable[[Path, Config], Sink | None]
"""Makes a user's sink for a run folder; None: the config does not request it. Its methods must return quickly."""


def run_files(folder: Path) -> dict[str, Sink]:
    """The files of a run folder, each a sink of its own: an error of one does not affect the others."""
    metrics, events, samples = (folder / name for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"))
    segment = next_segment(metrics, events)
    return {
        metrics.name: MetricsFile(metrics, segment),
        events.name: EventsFile(events, segment),
        samples.name: SamplesFile(samples, segment),
    }


class FanOut:
    """Passes all records to all sinks. `event` may be called from any thread, the rest from the training thread."""

    def __init__(
        self,
        direct: Mapping[str, Sink],
        queued: Mapping[str, Callable[[], Sink]],
        capacity: int = CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """`queued` sinks are made in the thread, so that training does not wait for a slow import or server."""
        self._direct = dict(direct)
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Call | None] = queue.Queue(capacity)
        self._dropped = 0
        self._abandoned = threading.Event()
        self._queued = " and ".join(queued)
        """Names of the queued sinks, for messages."""
        self._thread: threading.Thread | None = None
        if queued:
            self._thread = threading.Thread(target=self._work, args=(dict(queued),), name="sinks", daemon=True)
            self._thread.start()

    def add(self, name: str, sink: Sink) -> None:
        """Add a direct sink, called after the others."""
        self._direct[name] = sink

    def step(self, record: StepRecord) -> None:
        self._dispatch(lambda sink: sink.step(record))

    def validation(self, record: ValidationRecord) -> None:
        self._dispatch(lambda sink: sink.validation(record))

    def event(self, kind: str, /, **facts: Any) -> None:
        self._dispatch(lambda sink: sink.event(kind, facts))

    def sample(self, sample: Sample) -> None:
        self._dispatch(lambda sink: sink.sample(sample))

    def close(self) -> None:
        """Close all sinks; queued ones get `close_seconds`. The direct sink that was added last is closed first."""
        if self._thread is not None:
            self._join(self._thread, time.monotonic() + self._close_seconds)
        for name in reversed(list(self._direct)):
            self._try(self._direct, name, lambda sink: sink.close())

    def _join(self, thread: threading.Thread, deadline: float) -> None:
        try:
            self._queue.put(None, timeout=self._close_seconds)
        except queue.Full:
            self._abandoned.set()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            self._abandoned.set()
            text = "%s did not end within %g s: the last records may be missing there; metrics.jsonl has all"
            logger.warning(text, self._queued, self._close_seconds)
        if self._dropped:
            self.event("records_left_out", records=self._dropped)
            text = "%s: %d records came too fast and are missing; metrics.jsonl has all"
            logger.warning(text, self._queued, self._dropped)

    def _dispatch(self, call: Call) -> None:
        for name in list(self._direct):
            self._try(self._direct, name, call)
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("%s: too slow, records will be missing from now on", self._queued)

    def _try(self, sinks: dict[str, Sink], name: str, call: Call) -> None:
        sink = sinks.get(name)
        if sink is None:
            return
        try:
            call(sink)
        except Exception as error:  # noqa: BLE001  no error of a sink may stop training
            sinks.pop(name, None)
            self._report_failure(name, error)
            self._close_broken(name, sink)

    def _report_failure(self, name: str, error: Exception) -> None:
        text = str(error).strip().partition("\n")[0]
        why = masked(f"{type(error).__name__}: {text}")
        logger.warning("%s failed and is switched off, training goes on: %s", name, why)
        self.event("sink_failed", sink=name, why=why)

    def _close_broken(self, name: str, sink: Sink) -> None:
        """Close a sink that raised, to release its terminal, file or connection; errors are ignored."""
        try:
            sink.close()
        except Exception as error:  # noqa: BLE001  as above
            logger.debug("%s could not be closed either: %s", name, error)

    def _work(self, queued: dict[str, Callable[[], Sink]]) -> None:
        sinks: dict[str, Sink] = {}
        for name, make in queued.items():
            try:
                sinks[name] = make()
            except Exception as error:  # noqa: BLE001  as above
                self._report_failure(name, error)
        while (call := self._next()) is not None:
            for name in list(sinks):
                self._try(sinks, name, call)
        for name in list(sinks):
            self._try(sinks, name, lambda sink: sink.close())

    def _next(self) -> Call | None:
        while not self._abandoned.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
        return None


def open_sinks(
    folder: Path, config: Config, own: Mapping[str, SinkFactory], done: int, *, terminal: bool = False
) -> FanOut:
    """Open the sinks of the config and `own`, for a run that continues in `folder` after `done` steps. Rank 0 only.

    `own` are closed last, the first of them after all others. Packages were checked before (`monitor.packages`).
    """
    monitor, ckpt, total = config.monitor, config.ckpt, config.data.total_steps
    save_every = [n for n in (ckpt.checkpoint_steps, ckpt.oss_snapshot_freq) if n and ckpt.enable_save_ckpt]
    made = {name: make(folder, config) for name, make in own.items()}
    direct = {name: sink for name, sink in made.items() if sink is not None}
    direct |= {**run_files(folder), "the console": Console(total, terminal=terminal, save_every=save_every, done=done)}
    fan_out = FanOut(direct, _queued(folder, config, done))
    title = f"{config.JOB_NAME} {folder.name}"
    fan_out.add("alerts", AlertMonitor(monitor.alerts, total, written_folders(folder, ckpt), title, fan_out.event))
    return fan_out


def _queued(folder: Path, config: Config, done: int) -> dict[str, Callable[[], Sink]]:
    """Factories of the queued sinks; they import their packages in the queue's thread."""
    monitor = config.monitor

    def tensorboard() -> Sink:
        from internlm_lite.monitor.tensorboard import TensorBoard

        return TensorBoard(folder / "tensorboard", done)

    def wandb() -> Sink:
        from internlm_lite.monitor.wandb import Wandb

        assert monitor.wandb is not None
        return Wandb(folder, config, monitor.wandb)

    def mlflow() -> Sink:
        from internlm_lite.monitor.mlflow import Mlflow

        assert monitor.mlflow is not None
        return Mlflow(folder, config, monitor.mlflow)

    wanted = {
        "TensorBoard": (tensorboard, writes_tensorboard(monitor)),
        "wandb": (wandb, monitor.wandb is not None),
        "MLflow": (mlflow, monitor.mlflow is not None),
    }
    return {name: make for name, (make, is_wanted) in wanted.items() if is_wanted}
