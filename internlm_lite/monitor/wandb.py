"""Weights & Biases, offline unless the config says online; `wandb sync` sends what was written offline.

A run folder has one run of wandb, whose id is kept in the folder, so that a resumed run appends to it. The x axis of
every chart is our `step`, independent of wandb's own counter. Steps that a resume repeats are logged again.
"""

from __future__ import annotations

import logging
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from internlm_lite.config.masking import masked
from internlm_lite.config.render_config import resolved
from internlm_lite.config.schema import Config, WandbConfig
from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.scalars import step_scalars, task_scalars, validation_scalars

logger = logging.getLogger("internlm_lite")

FINISH_SECONDS = 8.0
"""Time limit of the upload at the end; the rest stays on disk for `wandb sync`."""
_TABLE_ROWS = 200
_SMALLEST_IS_BEST = ("train/loss", "train/loss_from_metric", "train/perplexity", "valid/loss", "valid/perplexity")
_LARGEST_IS_BEST = ("train/acc", "valid/acc")


class Wandb(Sink):
    """A run of wandb in `folder`/wandb."""

    def __init__(self, folder: Path, config: Config, settings: WandbConfig) -> None:
        """Start the run of wandb. Raises wandb's own errors."""
        mode = settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            logger.warning("monitor.wandb: found no login, so it writes offline: run `wandb login`, then `wandb sync`")
            mode = "offline"
        # wandb's telemetry follows the settings of the process, not those of the run.
        wandb.setup(wandb.Settings(mode=mode))
        self._rows: deque[list[Any]] = deque(maxlen=_TABLE_ROWS)
        self._new_rows = False
        self._run = wandb.init(
            id=kept_id(folder / "wandb-id"),
            resume="allow",
            project=settings.project,
            entity=settings.entity,
            group=settings.group,
            name=settings.name or f"{config.JOB_NAME}/{folder.name}",
            tags=settings.tags,
            mode=mode,
            dir=str(folder),
            config=masked(resolved(config)),
            settings=restricted_settings(),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for name in _SMALLEST_IS_BEST:
            self._run.define_metric(name, step_metric="step", summary="min,last")
        for name in _LARGEST_IS_BEST:
            self._run.define_metric(name, step_metric="step", summary="max,last")

    def step(self, record: StepRecord) -> None:
        self._run.log({"step": record.step, **step_scalars(record), **self._table()})

    def validation(self, record: ValidationRecord) -> None:
        self._run.log({"step": record.step, **validation_scalars(record)})

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Tasks that were evaluated apart are logged; the end of the run is written to wandb's summary."""
        if kind == "tasks":
            self._run.log({"step": facts["step"], **task_scalars(facts["tasks"])})
        if kind in ("done", "stopped", "failed"):
            self._run.summary["ended"] = kind

    def sample(self, sample: Sample) -> None:
        """Collected into one table, which is logged with the next step line."""
        self._rows.append([sample.step, sample.prompt, sample.text])
        self._new_rows = True

    def close(self) -> None:
        if self._new_rows:
            self._run.log({"step": max(0, self._rows[-1][0] - 1), **self._table()})
        self._run.finish()

    def _table(self) -> dict[str, Any]:
        if not self._new_rows:
            return {}
        self._new_rows = False
        return {"samples": wandb.Table(columns=["step", "prompt", "text"], data=list(self._rows))}


def restricted_settings() -> wandb.Settings:
    """wandb must not print, inspect this machine, or stop the run (by default a click in its page raises SIGINT)."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        disable_job_creation=True,
        save_code=False,
        x_disable_stats=True,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_save_requirements=False,
        finish_timeout=FINISH_SECONDS,
        stop_fn=_do_not_stop,
    )


def _do_not_stop() -> None:
    logger.warning("wandb asks to stop the run, which goes on: send it SIGTERM, or write its stop file")


def kept_id(file: Path) -> str:
    """The id of wandb's run, read from `file`, or a new one that is written there."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        new = uuid.uuid4().hex[:12]
        file.write_text(new + "\n", encoding="utf-8")
        return new
