"""The step line as text, in InternLM's format, and the figures of any step line of InternLM and InternEvo.

    ISO-time+zone INFO [file, line N, in func] - pid=N : tflops=... step=... ... loss/<folder>=... [mfu=...]<space>

Rounding is InternLM's: speeds and times to 2 digits, values of the metric (acc, perplexity, loss_from_metric and the
folder blocks) to 4, everything else as Python prints the float. New keys are appended after the folder blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from typing import Any

from internlm_lite.monitor.record import PassFigures, StepRecord

_GIB = 2**30
_STEP = re.compile(r"(?P<before>,?) ?(?<![\w/])step ?(?P<sign>[=:]) ?\d+(?![\w.])(?P<after>,?)")
_TIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:[.,](\d{1,6}))?(Z|[+-]\d\d:?\d\d)?")
_FOLDER_KEYS = ("tokens/", "loss/", "acc/")
_OF_PASSES = tuple(field.name for field in fields(PassFigures))
_NORM = re.compile(r"'([^']*)': ([^,}]+)")


@dataclass(frozen=True)
class Figure:
    """Format of one number of a `StepRecord` in the step line, and its tag in TensorBoard and wandb."""

    name: str
    """Attribute of the record, of `record.speed` or of `record.in_pass`."""
    read: Callable[[str], Any] = float
    """Parses the text of the line."""
    write: Callable[[Any], object] = float
    """Formats the value for the line."""
    key: str = ""
    """Key in the line; empty: `name`."""
    tag: str = ""
    """Tag in TensorBoard and wandb; empty: not shown there."""

    def of(self, record: StepRecord) -> Any:
        if self.name in _OF_PASSES:
            return getattr(record.in_pass, self.name, None)
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
        read=lambda text: {name: float(norm) for name, norm in _NORM.findall(text)} or {"0_default": float(text)},
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
    Figure("mfu", write=_digits(4), tag="mfu"),
    Figure("eta_seconds", read=_seconds, write=clock, key="eta"),
    Figure("stage", int, int, tag="stage"),
    Figure("pack_fill", write=_digits(4), tag="pack_fill"),
    Figure("epoch", int, int, tag="epoch"),
    Figure("epoch_step", int, int),
    Figure("accumulation_step", int, int),
    Figure("tokens_per_second", write=_digits(1), tag="tokens_per_second"),
    Figure(
        "memory_bytes",
        read=lambda text: round(float(text.removesuffix("GiB")) * _GIB),
        write=lambda n_bytes: f"{n_bytes / _GIB:.2f}GiB",
        key="memory",
        tag="memory_bytes",
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


def parse_step_line(text: str) -> dict[str, Any] | None:
    """The object of metrics.jsonl, without "seg", of any step line of InternLM, InternEvo or ours; None for other text.

    A step line has at least "step" and "loss", as key=value or key: value, separated by spaces or commas.
    """
    mark = _STEP.search(text)
    if mark is None:
        return None
    comma, sign = bool(mark["before"] or mark["after"]), mark["sign"]
    pairs = {_plain_key(pair["key"]): pair["value"] for pair in _pair(sign, comma).finditer(text)}
    figures: dict[str, Any] = {}
    for figure in FIGURES:
        with suppress(KeyError, ValueError):  # versions differ in what they print
            figures[figure.name] = figure.read(pairs[figure.key or figure.name])
    if not {"step", "loss"} <= figures.keys():
        return None
    names = dict.fromkeys(key.partition("/")[2] for key in pairs if key.startswith(_FOLDER_KEYS))
    folders = {name: [_number(pairs.get(f"{key}{name}")) for key in _FOLDER_KEYS] for name in names}
    return {"time": _time(text[: mark.start()]), **figures, "folders": folders}


@cache
def _pair(sign: str, comma: bool) -> re.Pattern[str]:
    """A key and its value. Lengths are bounded, so that no text takes long."""
    key = r"(?:acc|tokens|loss)/.{1,300}?|tgs \([^)]{1,30}\)|[\w/]+"
    value = rf"\{{[^}}]{{0,2000}}\}}|[+-]?(?:nan|inf|\d)[^\s={',' if comma else ''}]*"
    return re.compile(rf"(?<![\w/])(?P<key>{key}) ?{sign} ?(?P<value>{value})(?=\s{'|,' if comma else ''}|$)")


def _plain_key(key: str) -> str:
    """The key without the unit of a speed, of which InternLM had two spellings."""
    return "tgs (tokens/gpu/second)" if key.startswith("tgs (") else key


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _time(text: str) -> str | None:
    """The last time in a text, as ISO text with zone; one without zone is that of this machine."""
    found = list(_TIME.finditer(text))
    if not found:
        return None
    day, clock_time, fraction, zone = found[-1].groups(default="")
    try:
        time = datetime.strptime(f"{day} {clock_time}.{fraction or 0}{zone}", f"%Y-%m-%d %H:%M:%S.%f{zone and '%z'}")
        return (time if zone else time.astimezone()).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None
