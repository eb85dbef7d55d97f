"""The step line as text, in the seed's shape, and back.

    ISO-time+zone INFO [file, line N, in func] - pid=N : tflops=... step=... ... loss/<folder>=... [mfu=...]<space>

Rounding is the seed's: speeds and times to 2 digits, what the metric computed (acc, perplexity, loss_from_metric and
the folder blocks) to 4, everything else as Python prints the float. New keys stand after the folder blocks only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime

from internlm_lite.errors import DataError
from internlm_lite.monitor.record import FolderFigures, Origin, SpeedFigures, StepRecord

_GIB = 2**30
_HEADER = re.compile(r"(\S+) INFO \[(.*), line (\d+), in (.*)\] - pid=(\d+) : ")
_PAIR = re.compile(
    r"(?P<key>(?:acc|tokens|loss)/.+?|tgs \(tokens/gpu/second\)|[\w/]+)=(?P<value>\{.*?\}|[+-]?(?:nan|inf|\d)[^\s=]*) "
)
_NORM = re.compile(r"'([^']*)': ([^,}]+)")


def format_step_line(record: StepRecord) -> str:
    """The whole line of `record`, without a line break. It ends with a space, as the seed's do."""
    origin = record.origin
    header = (
        f"{record.time.isoformat(timespec='milliseconds')} INFO "
        f"[{origin.file}, line {origin.line}, in {origin.function}] - pid={origin.pid} : "
    )
    return header + "".join(f"{key}={value} " for key, value in _pairs(record))


def _pairs(record: StepRecord) -> Iterator[tuple[str, object]]:
    speed = record.speed
    yield "tflops", float(record.tflops)
    yield "step", record.step
    yield "loss", float(record.loss)
    yield "tgs (tokens/gpu/second)", round(speed.tgs, 2)
    yield "tgs/last_tgs_1", round(speed.last_tgs_1, 2)
    yield "tgs/tgs_all", round(speed.tgs_all, 2)
    yield "tgs/tgs_avg", round(speed.tgs_avg, 2)
    yield "tgs/tgs_SMA", round(speed.tgs_sma, 2)
    yield "tgs/last_tgs_10", round(speed.last_tgs_10, 2) or 0
    yield "tgs/last_tgs_50", round(speed.last_tgs_50, 2) or 0
    yield "lr", float(record.lr)
    yield "loss_scale", float(record.loss_scale)
    yield "grad_norm", {name: float(norm) for name, norm in record.grad_norm.items()}
    for key in ("micro_num", "num_consumed_tokens", "inf_nan_skip_batches", "num_samples_in_batch"):
        yield key, getattr(record, key)
    for key in ("largest_length", "largest_batch", "smallest_batch"):
        yield key, getattr(record, key)
    yield "adam_beta2", float(record.adam_beta2)
    yield "fwd_bwd_time", round(float(record.fwd_bwd_time), 2)
    yield "acc", round(float(record.acc), 4)
    yield "perplexity", round(float(record.perplexity), 4)
    yield from ((f"acc/{name}", round(float(folder.acc), 4)) for name, folder in record.folders.items())
    yield from ((f"tokens/{name}", folder.tokens) for name, folder in record.folders.items())
    yield "loss_from_metric", round(float(record.loss_from_metric), 4)
    yield from ((f"loss/{name}", round(float(folder.loss), 4)) for name, folder in record.folders.items())
    if record.mfu is not None:
        yield "mfu", round(float(record.mfu), 4)
    if record.eta_seconds is not None:
        yield "eta", clock(record.eta_seconds)
    if record.pack_fill is not None:
        yield "pack_fill", round(float(record.pack_fill), 4)
    if record.memory_bytes is not None:
        yield "memory", f"{record.memory_bytes / _GIB:.2f}GiB"


def parse_step_line(text: str) -> StepRecord:
    """The record of a line as `format_step_line` or the seed prints it; printing it again gives the same text.

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
    def number(key: str) -> float:
        return float(pairs[key])

    def whole(key: str) -> int:
        return int(pairs[key])

    names = [key.removeprefix("tokens/") for key in pairs if key.startswith("tokens/")]
    return StepRecord(
        time=time,
        origin=origin,
        step=whole("step"),
        loss=number("loss"),
        tflops=number("tflops"),
        speed=SpeedFigures(
            tgs=number("tgs (tokens/gpu/second)"),
            last_tgs_1=number("tgs/last_tgs_1"),
            tgs_all=number("tgs/tgs_all"),
            tgs_avg=number("tgs/tgs_avg"),
            tgs_sma=number("tgs/tgs_SMA"),
            last_tgs_10=number("tgs/last_tgs_10"),
            last_tgs_50=number("tgs/last_tgs_50"),
        ),
        lr=number("lr"),
        loss_scale=number("loss_scale"),
        grad_norm={name: float(norm) for name, norm in _NORM.findall(pairs["grad_norm"])},
        micro_num=whole("micro_num"),
        num_consumed_tokens=whole("num_consumed_tokens"),
        inf_nan_skip_batches=whole("inf_nan_skip_batches"),
        num_samples_in_batch=whole("num_samples_in_batch"),
        largest_length=whole("largest_length"),
        largest_batch=whole("largest_batch"),
        smallest_batch=whole("smallest_batch"),
        adam_beta2=number("adam_beta2"),
        fwd_bwd_time=number("fwd_bwd_time"),
        acc=number("acc"),
        perplexity=number("perplexity"),
        loss_from_metric=number("loss_from_metric"),
        folders={
            name: FolderFigures(whole(f"tokens/{name}"), number(f"loss/{name}"), number(f"acc/{name}"))
            for name in names
        },
        mfu=number("mfu") if "mfu" in pairs else None,
        eta_seconds=_seconds(pairs["eta"]) if "eta" in pairs else None,
        pack_fill=number("pack_fill") if "pack_fill" in pairs else None,
        memory_bytes=round(float(pairs["memory"].removesuffix("GiB")) * _GIB) if "memory" in pairs else None,
    )


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, hours unbounded: 93785 -> '26:03:05'. One word, so that it fits a key=value line."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _seconds(text: str) -> float:
    hours, minutes, seconds = map(int, text.split(":"))
    return float(hours * 3600 + minutes * 60 + seconds)
