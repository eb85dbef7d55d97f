"""Where rank 0's records go, and why none of these places can stop training or make a step wait.

    direct   console, files, alerts        called at once, quick
    queued   TensorBoard, wandb            one daemon thread works off a bounded queue; what does not fit is left out

A sink that raises is told once, in a log line and an event, and switched off.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from internlm_lite.config.schema import Config
from internlm_lite.config.view import masked
from internlm_lite.monitor.console import Console
from internlm_lite.monitor.disk import written_folders
from internlm_lite.monitor.jsonl import EventsFile, MetricsFile, SamplesFile, next_segment
from internlm_lite.monitor.packages import writes_tensorboard
from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.watch import Watch

logger = logging.getLogger("internlm_lite")

CAPACITY = 1000
"""Records that wait for slow sinks at most."""
CLOSE_SECONDS = 10.0
"""Slow sinks have so long to end at `close`."""

Call = Callable[[Sink], None]
SinkFactory = Callable[[Path, Config], Sink | None]
"""Makes a sink of your own for a run folder; None: the config does not ask for it. Its methods must be quick."""


def run_files(folder: Path) -> dict[str, Sink]:
    """The files of a run folder, each a sink of its own: what one of them cannot take costs no other."""
    metrics, events, samples = (folder / name for name in ("metrics.jsonl", "events.jsonl", "samples.jsonl"))
    segment = next_segment(metrics, events)
    return {
        metrics.name: MetricsFile(metrics, segment),
        events.name: EventsFile(events, segment),
        samples.name: SamplesFile(samples, segment),
    }


class FanOut:
    """Hands everything to all sinks. `event` may be called from any thread, the rest from the training thread."""

    def __init__(
        self,
        direct: Mapping[str, Sink],
        queued: Mapping[str, Callable[[], Sink]],
        capacity: int = CAPACITY,
        close_seconds: float = CLOSE_SECONDS,
    ) -> None:
        """`queued` sinks are made in the thread, where a slow import or a slow server holds nothing up."""
        self._direct = dict(direct)
        self._close_seconds = close_seconds
        self._queue: queue.Queue[Call | None] = queue.Queue(capacity)
        self._left_out = 0
        self._given_up = threading.Event()
        self._thread: threading.Thread | None = None
        if queued:
            self._thread = threading.Thread(target=self._work, args=(dict(queued),), name="sinks", daemon=True)
            self._thread.start()

    def add(self, name: str, sink: Sink) -> None:
        """One more direct sink, after the others."""
        self._direct[name] = sink

    def step(self, record: StepRecord) -> None:
        self._hand_on(lambda sink: sink.step(record))

    def validation(self, record: ValidationRecord) -> None:
        self._hand_on(lambda sink: sink.validation(record))

    def event(self, kind: str, /, **facts: Any) -> None:
        self._hand_on(lambda sink: sink.event(kind, facts))

    def sample(self, sample: Sample) -> None:
        self._hand_on(lambda sink: sink.sample(sample))

    def close(self) -> None:
        """End all sinks; slow ones get `close_seconds`. The last added direct sink is closed first."""
        if self._thread is not None:
            self._end_thread(self._thread, time.monotonic() + self._close_seconds)
        for name in reversed(list(self._direct)):
            self._try(self._direct, name, lambda sink: sink.close())

    def _end_thread(self, thread: threading.Thread, deadline: float) -> None:
        try:
            self._queue.put(None, timeout=self._close_seconds)
        except queue.Full:
            self._given_up.set()
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            self._given_up.set()
            logger.warning(
                f"slow sinks (TensorBoard, wandb) did not end within {self._close_seconds:g} s: their last records may "
                "be missing; metrics.jsonl has all"
            )
        if self._left_out:
            self.event("records_left_out", records=self._left_out)
            logger.warning(
                f"TensorBoard and wandb miss {self._left_out} records that came too fast; metrics.jsonl has all"
            )

    def _hand_on(self, call: Call) -> None:
        for name in list(self._direct):
            self._try(self._direct, name, call)
        if self._thread is None:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                logger.warning("TensorBoard and wandb do not keep up: they miss records from now on")

    def _try(self, sinks: dict[str, Sink], name: str, call: Call) -> None:
        sink = sinks.get(name)
        if sink is None:
            return
        try:
            call(sink)
        except Exception as error:  # noqa: BLE001  whatever it is, it must not stop training
            sinks.pop(name, None)
            self._tell_failure(name, error)
            self._close_broken(name, sink)

    def _tell_failure(self, name: str, error: Exception) -> None:
        text = str(error).strip().partition("\n")[0]
        why = masked(f"{type(error).__name__}: {text}")
        logger.warning(f"{name} failed and is switched off, training goes on: {why}")
        self.event("sink_failed", sink=name, why=why)

    def _close_broken(self, name: str, sink: Sink) -> None:
        """It may hold a terminal, a file or a connection."""
        try:
            sink.close()
        except Exception as error:  # noqa: BLE001  as above
            logger.debug(f"{name} could not be closed either: {error}")

    def _work(self, queued: dict[str, Callable[[], Sink]]) -> None:
        sinks: dict[str, Sink] = {}
        for name, make in queued.items():
            try:
                sinks[name] = make()
            except Exception as error:  # noqa: BLE001  as above
                self._tell_failure(name, error)
        while (call := self._next()) is not None:
            for name in list(sinks):
                self._try(sinks, name, call)
        for name in list(sinks):
            self._try(sinks, name, lambda sink: sink.close())

    def _next(self) -> Call | None:
        while not self._given_up.is_set():
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
        return None


def open_sinks(
    folder: Path, config: Config, own: Mapping[str, SinkFactory], done: int, *, terminal: bool = False
) -> FanOut:
    """Those of the config and `own`, for a run that has done `done` steps and goes on in `folder`. On rank 0.

    `own` are closed last, the first of them after all others. Packages are checked already (`monitor.packages`).
    """
    monitor, ckpt, total = config.monitor, config.ckpt, config.data.total_steps
    save_every = [n for n in (ckpt.checkpoint_every, ckpt.oss_snapshot_freq) if n and ckpt.enable_save_ckpt]
    made = {name: make(folder, config) for name, make in own.items()}
    direct = {name: sink for name, sink in made.items() if sink is not None}
    direct |= {**run_files(folder), "the console": Console(total, terminal, save_every, done)}
    fan_out = FanOut(direct, _queued(folder, config, done))
    title = f"{config.JOB_NAME} {folder.name}"
    fan_out.add("alerts", Watch(monitor.alerts, total, written_folders(folder, ckpt), title, fan_out.event))
    return fan_out


def _queued(folder: Path, config: Config, done: int) -> dict[str, Callable[[], Sink]]:
    """Their packages are imported in the thread that makes them."""
    monitor = config.monitor

    def tensorboard() -> Sink:
        from internlm_lite.monitor.tensorboard import TensorBoard

        return TensorBoard(folder / "tensorboard", done)

    def wandb() -> Sink:
        from internlm_lite.monitor.wandb import Wandb

        assert monitor.wandb is not None
        return Wandb(folder, config, monitor.wandb)

    wanted = {"TensorBoard": (tensorboard, writes_tensorboard(monitor)), "wandb": (wandb, monitor.wandb is not None)}
    return {name: make for name, (make, is_wanted) in wanted.items() if is_wanted}
