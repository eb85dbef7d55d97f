"""The sinks of a run, as its config wants them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from internlm_lite.apps.report.writer import ReportWriter
from internlm_lite.config.schema import Config
from internlm_lite.monitor.alert_monitor import AlertMonitor
from internlm_lite.monitor.console import Console
from internlm_lite.monitor.disk_usage import written_folders
from internlm_lite.monitor.packages import writes_tensorboard
from internlm_lite.monitor.record import Sink
from internlm_lite.monitor.sinks import FanOut, run_files


def open_sinks(folder: Path, config: Config, done: int, terminal: bool) -> FanOut:
    """On rank 0, for a run that has done `done` steps and goes on in `folder`. Its packages are checked already."""
    monitor, ckpt, total = config.monitor, config.ckpt, config.data.total_steps
    save_every = [n for n in (ckpt.checkpoint_every, ckpt.oss_snapshot_freq) if n and ckpt.enable_save_ckpt]
    direct: dict[str, Sink] = {}
    if monitor.report_every_seconds:
        # The first is closed last, so that the page shows the end.
        direct["the report"] = Report(folder, monitor.report_every_seconds)
    direct |= {**run_files(folder), "the console": Console(total, terminal, save_every, done)}
    fan_out = FanOut(direct, _queued(folder, config, done))
    title = f"{config.JOB_NAME} {folder.name}"
    fan_out.add("alerts", AlertMonitor(monitor.alerts, total, written_folders(folder, ckpt), title, fan_out.event))
    return fan_out


class Report(Sink):
    """report.html, made from the files of the run folder beside training."""

    def __init__(self, folder: Path, every_seconds: float) -> None:
        self._writer = ReportWriter(folder, every_seconds)

    def close(self) -> None:
        self._writer.close()


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

    sinks: dict[str, Callable[[], Sink]] = {}
    if writes_tensorboard(monitor):
        sinks["TensorBoard"] = tensorboard
    if monitor.wandb is not None:
        sinks["wandb"] = wandb
    return sinks
