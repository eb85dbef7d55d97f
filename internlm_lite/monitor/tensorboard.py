"""TensorBoard's event files, in the run folder: scalars, one chart for all folders, samples as text.

Written with tensorboard's own protocol buffers and record format; one event holds all scalars of a line. A run that
goes on from a checkpoint tells TensorBoard to forget the steps it will repeat, so that an overlap is drawn once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from textwrap import indent

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout, MultilineChartContent
from tensorboard.summary.writer.record_writer import RecordWriter

from internlm_lite.monitor.record import Sample, Sink, StepRecord, ValidationRecord
from internlm_lite.monitor.scalars import FOLDER_FIGURES, step_scalars, validation_scalars

CODE = "    "
"""Lines that begin so are shown by Markdown as they are."""
_TITLE_LENGTH = 60


class TensorBoard(Sink):
    """Appends to a new event file in `folder`. `done`: steps done before, of a run that goes on."""

    def __init__(self, folder: Path, done: int) -> None:
        """Raises OSError where the file cannot be made, and later where it cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        self._prompts: list[str] = []
        earlier = any(folder.glob("events.out.tfevents.*"))
        now = time.time_ns()
        self._writer = RecordWriter((folder / f"events.out.tfevents.{now // 10**9}.internlm_lite.{now}").open("xb"))
        self._write(Event(file_version="brain.Event:2"), 0, now / 1e9)
        if earlier:
            self._write(Event(session_log=SessionLog(status=SessionLog.START)), done, now / 1e9)
        self._write(Event(summary=Summary(value=[folder_charts()])), done, now / 1e9)

    def step(self, record: StepRecord) -> None:
        self._write(scalar_event(step_scalars(record)), record.step, record.time.timestamp())

    def validation(self, record: ValidationRecord) -> None:
        self._write(scalar_event(validation_scalars(record)), record.step, time.time())

    def sample(self, sample: Sample) -> None:
        if sample.prompt not in self._prompts:
            self._prompts.append(sample.prompt)
        title = f"samples/{self._prompts.index(sample.prompt)} {' '.join(sample.prompt.split())[:_TITLE_LENGTH]}"
        body = f"{indent(sample.prompt, CODE)}\n\n---\n\n{indent(sample.text, CODE)}"
        self._write(Event(summary=Summary(value=[text_value(title, body)])), max(0, sample.step - 1), time.time())

    def close(self) -> None:
        self._writer.close()

    def _write(self, event: Event, step: int, seconds: float) -> None:
        event.step, event.wall_time = step, seconds
        self._writer.write(event.SerializeToString())
        self._writer.flush()


def scalar_event(scalars: Mapping[str, float]) -> Event:
    return Event(summary=Summary(value=[Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]))


def text_value(tag: str, text: str) -> Summary.Value:
    return _strings(f"{tag}/text_summary", "text", text.encode("utf-8", "backslashreplace"), 1)


def folder_charts() -> Summary.Value:
    """The layout of the tab CUSTOM SCALARS: for each figure one chart with the line of every folder."""

    def chart(title: str, prefix: str) -> Chart:
        return Chart(title=title, multiline=MultilineChartContent(tag=[f"^{prefix}/"]))

    layout = Layout(
        category=[
            Category(title="folders", chart=[chart(name, name) for name in FOLDER_FIGURES]),
            Category(
                title="validation folders", chart=[chart(f"val {name}", f"val_{name}") for name in FOLDER_FIGURES]
            ),
        ]
    )
    return _strings("custom_scalars__config__", "custom_scalars", layout.SerializeToString())


def _strings(tag: str, plugin: str, value: bytes, *shape: int) -> Summary.Value:
    sizes = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in shape])
    return Summary.Value(
        tag=tag,
        tensor=TensorProto(dtype=DT_STRING, string_val=[value], tensor_shape=sizes),
        metadata=SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin)),
    )
