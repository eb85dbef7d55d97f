"""The newest figures of runs in Prometheus' text format, version 0.0.4.

    internlm_lite_loss{run="demo/2026-11-21"} 2.31
    internlm_lite_folder_loss{run="demo/2026-11-21",folder="code"} 1.98
    internlm_lite_state{run="demo/2026-11-21",state="training"} 1

https://prometheus.io/docs/instrumenting/exposition_formats/: all samples of a name in one group, after HELP and TYPE;
no name with the same labels twice; in values of labels backslash, quote and line feed are escaped. What is not known
is left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from internlm_lite.apps.report.columns import seconds
from internlm_lite.apps.report.history import Event, tasks, validation
from internlm_lite.apps.report.payload import UNREADABLE, batch_tokens, folder_table, window
from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.run_state import PHASES, last_number, run_state
from internlm_lite.apps.report.untrusted_files import printable

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "internlm_lite_"
FAMILIES: Mapping[str, tuple[str, str]] = {
    "step": ("gauge", "Steps done."),
    "total_steps": ("gauge", "Steps of the whole run."),
    "tokens": ("gauge", "Tokens trained on. Falls when a restart repeats steps."),
    "loss": ("gauge", "Training loss of the last step line."),
    "learning_rate": ("gauge", "Learning rate of the next step."),
    "batch_tokens": ("gauge", "Tokens per step."),
    "tokens_per_second": ("gauge", "Tokens per second over all devices, over the last lines."),
    "tokens_per_device_second": ("gauge", "Tokens per device and second of the last line."),
    "tflops": ("gauge", "TFLOP/s per device."),
    "mfu": ("gauge", "Fraction of the peak FLOP/s reached."),
    "gradient_norm": ("gauge", "Gradient norm before clipping, of the parameters in the dtype of the model."),
    "memory_bytes": ("gauge", "Peak memory of the first device."),
    "eta_seconds": ("gauge", "Estimated time to the last step."),
    "skipped_steps": ("gauge", "Steps skipped because of overflow, since the run began."),
    "restarts": ("gauge", "Starts of the run but the first."),
    "last_line_timestamp_seconds": ("gauge", "Time of the newest line or event."),
    "state": ("gauge", "1 for the state that the run is in, 0 for the others."),
    "folder_loss": ("gauge", "Loss of a data folder over the last lines."),
    "folder_accuracy": ("gauge", "Accuracy on a data folder over the last lines."),
    "folder_tokens": ("gauge", "Labels of a data folder trained on."),
    "validation_step": ("gauge", "Step of the last evaluation."),
    "validation_loss": ("gauge", 'Loss of the last evaluation; weights="ema": of the averaged weights.'),
    "validation_accuracy": ("gauge", "Accuracy of the last evaluation."),
    "validation_bits_per_byte": ("gauge", "Bits per byte of the last evaluation."),
    "validation_folder_loss": ("gauge", "Loss on a validation folder in the last evaluation."),
    "task": ("gauge", "A figure of a task in the last evaluation of tasks."),
}
"""Name without prefix -> its type and help, in the order of the text."""


@dataclass(frozen=True)
class Gauge:
    """One sample; None: left out."""

    name: str
    value: float | None
    labels: Mapping[str, str]


def render_metrics(runs: Sequence[RunReader], now: datetime) -> str:
    """The text over these runs. Runs of the same name are told apart by their folders."""
    names = [run.name for run in runs]
    found: dict[str, list[str]] = {name: [] for name in FAMILIES}
    for run in runs:
        name = run.name if names.count(run.name) == 1 else printable(run.folder)
        for gauge in _gauges_of(run, now):
            if gauge.value is not None and math.isfinite(gauge.value):
                found[gauge.name].append(_line(gauge, {"run": name, **gauge.labels}))
    lines = []
    for family, samples in found.items():
        kind, text = FAMILIES[family]
        if samples:
            lines += [f"# HELP {PREFIX}{family} {text}", f"# TYPE {PREFIX}{family} {kind}", *samples]
    return "".join(f"{line}\n" for line in lines)


def _line(gauge: Gauge, labels: Mapping[str, str]) -> str:
    texts = ",".join(f'{label}="{escaped_label(text)}"' for label, text in labels.items())
    return f"{PREFIX}{gauge.name}{{{texts}}} {float(gauge.value or 0)!r}"


def escaped_label(text: str) -> str:
    """The text as it stands between the quotes of a label. Half a surrogate pair, which UTF-8 has not, is written out:
    names that differ stay different."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _gauges_of(run: RunReader, now: datetime) -> list[Gauge]:
    """All of a run; only its state if its files cannot be interpreted."""
    try:
        if run.error is not None:
            raise ValueError(run.error)
        return [*_progress(run, now), *_folders(run), *_evaluations(run)]
    except Exception:  # noqa: BLE001  one run must not hide the others
        return list(_states(UNREADABLE))


def _states(phase: str) -> Iterator[Gauge]:
    for name in (*PHASES, UNREADABLE):
        yield Gauge("state", float(name == phase), {"state": name})


def _progress(run: RunReader, now: datetime) -> Iterator[Gauge]:
    state = run_state(run, now)
    starts = sum(event["event"] == "start" for event in run.events)
    batch = batch_tokens(run.columns)
    figures = {
        **{name: state[name] for name in ("step", "total_steps", "tokens", "loss", "tflops", "mfu", "eta_seconds")},
        "learning_rate": last_number(run, "lr"),
        "batch_tokens": float(batch[-1]) if len(batch) else None,
        "tokens_per_second": _tokens_per_second(run),
        "tokens_per_device_second": state["tgs"],
        "gradient_norm": last_number(run, "grad_norm/0_default"),
        "memory_bytes": last_number(run, "memory_bytes"),
        "skipped_steps": last_number(run, "inf_nan_skip_batches"),
        "restarts": max(0, starts - 1),
        "last_line_timestamp_seconds": seconds(state["last_time"]),
    }
    for name, value in figures.items():
        yield Gauge(name, value, {})
    yield from _states(state["phase"])


def _tokens_per_second(run: RunReader) -> float | None:
    """Over the window of the page; None with one line, or where clocks turned back."""
    columns = run.columns
    consumed, first = columns.scalars.get("num_consumed_tokens"), -1 - window(columns.n)
    if consumed is None or columns.n < 2:
        return None
    first = max(first, -columns.n)
    span = columns.time[-1] - columns.time[first]
    return float((consumed[-1] - consumed[first]) / span) if np.isfinite(span) and span > 0 else None


def _folders(run: RunReader) -> Iterator[Gauge]:
    for row in folder_table(run, []):
        labels = {"folder": row["name"]}
        yield Gauge("folder_loss", row["loss"], labels)
        yield Gauge("folder_accuracy", row["acc"], labels)
        yield Gauge("folder_tokens", row["tokens"], labels)


def _evaluations(run: RunReader) -> Iterator[Gauge]:
    """Of the last evaluation, and of the last one of tasks."""
    for check in validation(run.events)[-1:]:
        yield Gauge("validation_step", check["step"], {})
        for weights, figures in (("model", check), ("ema", check["ema"])):
            yield from _overall(figures, {"weights": weights})
        for name, figures in check["folders"].items():
            loss = figures[1] if isinstance(figures, list) and len(figures) == 3 else None
            yield Gauge("validation_folder_loss", loss, {"folder": name})
    for item in tasks(run.events)[-1:]:
        for task, figures in item["tasks"].items():
            for metric, value in figures.items():
                yield Gauge("task", value, {"task": task, "metric": metric})


def _overall(figures: Event, labels: Mapping[str, str]) -> Iterator[Gauge]:
    for name, key in (("loss", "loss"), ("accuracy", "acc"), ("bits_per_byte", "bits_per_byte")):
        yield Gauge(f"validation_{name}", figures.get(key), labels)
