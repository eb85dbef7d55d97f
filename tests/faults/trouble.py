"""Training runs that meet trouble with their storage between two steps, and what is to be seen of it afterwards."""

from __future__ import annotations

import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.config.schema import Config
from internlm_lite.faults.signals import StopSignals
from internlm_lite.mesh.mesh import single_process_mesh
from internlm_lite.monitor.jsonl import read_objects
from internlm_lite.train import loop
from internlm_lite.train.build import build_run
from internlm_lite.train.trainer import Trainer
from tests.faults.states import assert_nothing_else
from tests.steps import read_metrics
from tests.train.runs import curve, tiny

STEPS = 12
"""With a snapshot after every second step, and a final checkpoint."""


def disk_name() -> str:
    """What /proc/mounts calls the small disks of this process."""
    return f"faults-{os.getpid()}"


@contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    """A file system of its own in memory, `size` as mount has it."""
    place.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", disk_name(), str(place)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def fill(place: Path, left_bytes: int = 0) -> None:
    """Use up the disk, all but `left_bytes` of it."""
    with open(place / "filler", "wb", buffering=0) as file:
        try:
            while file.write(b"x" * 65536) == 65536:
                pass
        except OSError:
            pass
        file.truncate(file.tell() - left_bytes)


@dataclass(frozen=True)
class Told:
    """What a run said."""

    curve: list[tuple[float, float]]
    log: str
    done: list[int]
    """Steps of the checkpoints that were written in the background."""
    alarms: dict[int, str]
    """Step -> why its checkpoint is missing."""
    skipped: int


def config_for(corpus: Path, disk: Path | None, **ckpt: Any) -> Config:
    """Without a disk: nothing is saved."""
    folders = {"save_ckpt_folder": f"local:{disk}/saves", "snapshot_ckpt_folder": f"local:{disk}/snapshots"}
    values = {} if disk is None else {"enable_save_ckpt": True, **folders, "oss_snapshot_freq": 2, **ckpt}
    return tiny(
        corpus, ckpt=values, data={"total_steps": STEPS}, lr_scheduler={"total_steps": STEPS, "warmup_ratio": 0.25}
    )


def trained(config: Config, folder: Path, happens: Mapping[int, Callable[[], object]], *, patient: bool = True) -> Told:
    """Train to the end. `happens`: what is done before that step, counted from 0. `patient`: every save ends before the
    next step begins.
    """
    folder.mkdir()
    log = logging.getLogger("internlm_lite")
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(handler)
    original = Trainer.step
    run = build_run(config, single_process_mesh(), folder)

    def disturbed_step(trainer: Trainer, batch: Any, step: int, **hooks: Any) -> Any:
        running = run.checkpoints.saver._running
        if patient and running is not None:
            running.exception()
        happens.get(step, lambda: None)()
        return original(trainer, batch, step, **hooks)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Trainer, "step", disturbed_step)
            loop.train(run, StopSignals())
    finally:
        run.checkpoints.close(wait=True)
        run.reporter.close()
        log.removeHandler(handler)
    return _told(folder, "\n".join(lines), run.checkpoints.saver.skipped)


def _told(folder: Path, log: str, skipped: int) -> Told:
    events = list(read_objects(folder / "events.jsonl"))
    done = [int(event["name"].split("-")[0]) for event in events if event["event"] == "checkpoint_done"]
    alarms = [event for event in events if event["event"] == "alarm"]
    assert all(event["what"] == "checkpoint failed" for event in alarms)
    assert log.count("ALARM: checkpoint ") == len(alarms), "every alarm is in the log and among the events"
    return Told(
        curve(read_metrics(folder / "metrics.jsonl")),
        log,
        done,
        {_step_of(event["checkpoint"]): event["why"] for event in alarms},
        skipped,
    )


def _step_of(checkpoint: str) -> int:
    """Of `step 4`, or of a checkpoint's name."""
    return int(checkpoint.removeprefix("step ").split("-")[0])


def assert_sound(folder: Path, steps: list[int]) -> None:
    """Whole checkpoints of these steps, newest first, and nothing else."""
    storage = LocalStorage(folder)
    names = committed(storage)
    assert [name.step for name in names] == steps
    assert [str(damage) for name in names for damage in damages_of(storage, name)] == []
    assert_nothing_else(folder)
