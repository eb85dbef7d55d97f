"""TensorBoard's event files, in the run folder: scalars, one chart for all folders, samples as text.

A run that continues from a checkpoint makes TensorBoard drop the steps that it will repeat, so that each is shown
once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.scalars import FOLDER_FIGURES, step_scalars, task_scalars, validation_scalars

CODE = "    "
"""Markdown shows lines with this indentation unchanged."""
_TITLE_LENGTH = 60


class TensorBoard(Sink):
    """Writes a new event file in `folder`. `done`: the number of steps that earlier starts of the run have done."""

    def __init__(self, folder: Path, done: int) -> None:
        """Raises OSError if the file cannot be made, later methods if it cannot be written."""
        resumed = any(folder.glob("events.out.tfevents.*"))
        self._prompts: list[str] = []
        self._writer = SummaryWriter(str(folder), purge_step=done if resumed else None)
        prefixes = {"folders": "", "validation folders": "val "}
        self._writer.add_custom_scalars(
            {
                category: {f"{prefix}{name}": _chart(f"{prefix}{name}") for name in FOLDER_FIGURES}
                for category, prefix in prefixes.items()
            }
        )
        self._writer.flush()

    def step(self, record: StepRecord) -> None:
        self._scalars(step_scalars(record), record.step, record.time.timestamp())

    def validation(self, record: ValidationRecord) -> None:
        self._scalars(validation_scalars(record), record.step, time.time())

    def event(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Tasks that were evaluated apart from the validation data."""
        if kind == "tasks":
            self._scalars(task_scalars(facts["tasks"]), facts["step"], time.time())

    def sample(self, sample: Sample) -> None:
        if sample.prompt not in self._prompts:
            self._prompts.append(sample.prompt)
        title = f"samples/{self._prompts.index(sample.prompt)} {' '.join(sample.prompt.split())[:_TITLE_LENGTH]}"
        body = f"{indent(sample.prompt, CODE)}\n\n---\n\n{indent(sample.text, CODE)}"
        self._writer.add_text(_encodable(title), _encodable(body), max(0, sample.step - 1))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, scalars: Mapping[str, float], step: int, seconds: float) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step, seconds)
        self._writer.flush()


def _chart(title: str) -> list[object]:
    """One chart with the series of every folder, such as loss/code and loss/docs; tags are regular expressions."""
    return ["Multiline", [f"^{title.replace(' ', '_')}/"]]


def _encodable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
