"""The step line as text, in InternLM's format, and back.

    ISO-time+zone INFO [file, line N, in func] - pid=N : tflops=... step=... ... loss/<folder>=... [mfu=...]<space>

Rounding is InternLM's: speeds and times to 2 digits, values of the metric (acc, perplexity, loss_from_metric and the
folder blocks) to 4, everything else as Python prints the float. New keys are appended after the folder blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from internlm_lite.errors import DataError
from internlm_lite.monitor.record import FolderFigures, Origin, SpeedFigures, StepRecord

_GIB = 2**30
_HEADER = re.compile(r"(\S+) INFO \[(.*), line (\d+), in (.*)\] - pid=(\d+) : ")
_PAIR = re.compile(
    r"(?P<key>(?:acc|tokens|loss)/.+?|tgs \(tokens/gpu/second\)|[\w/]+)=(?P<value>\{.*?\}|[+-]?(?:nan|inf|\d)[^\s=]*) "
)
_NORM = re.compile(r"'([^']*)': ([^,}]+)")


@dataclass(frozen=True)
class Figure:
    """Format of one number of a `StepRecord` in the step line, and its tag in TensorBoard and wandb."""

    name: str
    """Attribute of the record or of `record.speed`."""
    read: Callable[[str], Any] = float
    """Parses the text of the line."""
    write: Callable[[Any], object] = float
    """Formats the value for the line."""
    key: str = ""
    """Key in the line; empty: `name`."""
    tag: str = ""
    """Tag in TensorBoard and wandb; empty: not shown there."""
    optional: bool = False
    """Whether a line may lack it, as InternLM's lines do."""

    def of(self, record: StepRecord) -> Any:
        return getattr(record.speed if hasattr(record.speed, self.name) else record, self.name)


def _digits(digits: int) -> Callable[[float], float]:
    return lambda value: round(float(value), digits)


def _block_speed(value: float) -> float:
    """InternLM prints 0, not 0.0, before the first block is full."""
    return round(value, 2) or 0


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, hours unbounded: 93785 -> '26:03:05'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _seconds(text: str) -> float:
    hours, minutes, seconds = map(int, text.split(":"))
    return float(hours * 3600 + minutes * 60 + seconds)


FIGURES = (
    Figure("tflops", tag="tflops"),
    Figure("step", int, int),
    Figure("loss", tag="train/loss"),
    Figure("tgs", write=_digits(2), key="tgs (tokens/gpu/second)", tag="tgs"),
    Figure("last_tgs_1", write=_digits(2), key="tgs/last_tgs_1"),
    Figure("tgs_all", write=_digits(2), key="tgs/tgs_all"),
    Figure("tgs_avg", write=_digits(2), key="tgs/tgs_avg"),
    Figure("tgs_sma", write=_digits(2), key="tgs/tgs_SMA"),
    Figure("last_tgs_10", write=_block_speed, key="tgs/last_tgs_10"),
    Figure("last_tgs_50", write=_block_speed, key="tgs/last_tgs_50"),
    Figure("lr", tag="lr"),
    Figure("loss_scale", tag="loss_scale"),
    Figure(
        "grad_norm",
        read=lambda text: {name: float(norm) for name, norm in _NORM.findall(text)},
        write=lambda norms: {name: float(norm) for name, norm in norms.items()},
    ),
    Figure("micro_num", int, int),
    Figure("num_consumed_tokens", int, int, tag="train/num_consumed_tokens"),
    Figure("inf_nan_skip_batches", int, int, tag="inf_nan_skip_batches"),
    Figure("num_samples_in_batch", int, int),
    Figure("largest_length", int, int),
    Figure("largest_batch", int, int),
    Figure("smallest_batch", int, int),
    Figure("adam_beta2", tag="adam_beta2"),
    Figure("fwd_bwd_time", write=_digits(2), tag="fwd_bwd_time"),
    Figure("acc", write=_digits(4), tag="train/acc"),
    Figure("perplexity", write=_digits(4), tag="train/perplexity"),
    Figure("loss_from_metric", write=_digits(4), tag="train/loss_from_metric"),
    Figure("mfu", write=_digits(4), tag="mfu", optional=True),
    Figure("eta_seconds", read=_seconds, write=clock, key="eta", optional=True),
    Figure("pack_fill", write=_digits(4), tag="pack_fill", optional=True),
    Figure(
        "memory_bytes",
        read=lambda text: round(float(text.removesuffix("GiB")) * _GIB),
        write=lambda n_bytes: f"{n_bytes / _GIB:.2f}GiB",
        key="memory",
        tag="memory_bytes",
        optional=True,
    ),
)
"""In the order of the line."""


def format_step_line(record: StepRecord) -> str:
    """The whole line of `record`, without a line break. It ends with a space, as InternLM's do."""
    origin = record.origin
    header = (
        f"{record.time.isoformat(timespec='milliseconds')} INFO "
        f"[{origin.file}, line {origin.line}, in {origin.function}] - pid={origin.pid} : "
    )
    return header + "".join(f"{key}={value} " for key, value in _pairs(record))


def _pairs(record: StepRecord) -> Iterator[tuple[str, object]]:
    folders = record.folders.items()
    for figure in FIGURES:
        if (value := figure.of(record)) is not None:
            yield figure.key or figure.name, figure.write(value)
        if figure.name == "perplexity":
            yield from ((f"acc/{name}", round(float(folder.acc), 4)) for name, folder in folders)
            yield from ((f"tokens/{name}", folder.tokens) for name, folder in folders)
        if figure.name == "loss_from_metric":
            yield from ((f"loss/{name}", round(float(folder.loss), 4)) for name, folder in folders)


def parse_step_line(text: str) -> StepRecord:
    """The record of a line that `format_step_line` or InternLM printed; printing it again gives the same text.

    Raises DataError when `text` is no step line.
    """
    header = _HEADER.match(text)
    if header is None:
        raise DataError(f"not a step line: {text[:80]!r}; expected 'TIME INFO [file, line N, in func] - pid=N : ...'")
    pairs = {match["key"]: match["value"] for match in _PAIR.finditer(text.rstrip() + " ", header.end())}
    time, file, line, function, pid = header.groups()
    try:
        return _record(pairs, datetime.fromisoformat(time), Origin(file, int(line), function, int(pid)))
    except (KeyError, ValueError) as error:
        raise DataError(f"a step line lacks or garbles {error}: {text[:80]!r}") from error


def _record(pairs: dict[str, str], time: datetime, origin: Origin) -> StepRecord:
    values = {
        figure.name: figure.read(pairs[figure.key or figure.name])
        for figure in FIGURES
        if not figure.optional or (figure.key or figure.name) in pairs
    }
    speed = SpeedFigures(**{name: values.pop(name) for name in SpeedFigures.__annotations__})
    names = [key.removeprefix("tokens/") for key in pairs if key.startswith("tokens/")]
    folders = {
        name: FolderFigures(int(pairs[f"tokens/{name}"]), float(pairs[f"loss/{name}"]), float(pairs[f"acc/{name}"]))
        for name in names
    }
    return StepRecord(time=time, origin=origin, speed=speed, folders=folders, **values)
