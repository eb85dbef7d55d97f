"""The figures of all step lines as columns of numbers, compact and quick to slice for 50,000 steps of 33 folders.

    scalar  "loss", "grad_norm/1_fp32", ...     float64 [lines]         nan if a line has no value
    folder  "code", ...                         float64 [lines, 4]      tokens learnt, loss, accuracy, tokens seen

A restart repeats steps: lines of an earlier segment, from the first step of a later segment on, are superseded and
dropped, so steps rise strictly. Where a line has no "seen", the tokens seen are the tokens learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Shape = tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...], tuple[str, ...]]
"""Keys of a line: scalars, dicts of scalars with their keys, folders."""

_NOT_SCALARS = {"seg", "step", "time", "folders", "seen"}
_WIDTH = 4
_MAX_NUMBER = 1e100
"""Larger numbers count as missing, so that sums and products stay finite."""
MAX_STEP = 10**12
"""A line with a larger step or segment is invalid: accepting it would reject all later ones."""


class _GrowingColumn:
    """A column that doubles its memory as needed; rows that were never written are nan."""

    def __init__(self, width: int | None) -> None:
        self._tail = () if width is None else (width,)
        self._values: Numbers = np.full((1024, *self._tail), np.nan)
        self.any = False

    def put(self, start: int, block: Numbers) -> None:
        end = start + len(block)
        if end > len(self._values):
            grown = np.full((max(end, 2 * len(self._values)), *self._tail), np.nan)
            grown[: len(self._values)] = self._values
            self._values = grown
        self._values[start:end] = block
        self.any = self.any or bool(np.isfinite(block).any())

    def cut(self, end: int) -> None:
        self._values[end:] = np.nan

    def view(self, n: int) -> Numbers:
        if n > len(self._values):
            self.put(n, self._values[:0])
        return self._values[:n]


class Columns:
    """The step lines read so far: `n` lines; `bad` counts invalid ones, which were dropped."""

    def __init__(self) -> None:
        self.n = 0
        self.bad = 0
        self.starts: dict[int, int] = {}
        """First step of each segment that has lines."""
        self.max_segment = -1
        """Highest segment named by the events; -1 without events."""
        self._starts: dict[int, int] = {}
        self._total = MAX_STEP
        self.last_time: str | None = None
        self.segment = -1
        """Segment of the newest line."""
        self._next = 0
        self._step, self._time = _GrowingColumn(None), _GrowingColumn(None)
        self._scalars: dict[str, _GrowingColumn] = {}
        self._folders: dict[str, _GrowingColumn] = {}

    @property
    def step(self) -> Numbers:
        return self._step.view(self.n)

    @property
    def time(self) -> Numbers:
        """Time of each line, in seconds since the epoch."""
        return self._time.view(self.n)

    @property
    def scalars(self) -> dict[str, Numbers]:
        """Name -> column, for scalars with at least one number."""
        return {key: column.view(self.n) for key, column in self._scalars.items() if column.any}

    @property
    def folders(self) -> dict[str, Numbers]:
        """Name -> columns of a folder, in the order of the lines."""
        return {name: column.view(self.n) for name, column in self._folders.items()}

    def start_segment(self, segment: int, step: int, total: int) -> None:
        """A start event: from `step` on, lines of earlier segments are superseded. `total`: steps of the whole run."""
        self._total = total if not self._starts else max(total, self._total)
        self._starts[segment] = step
        self.max_segment = max(self.max_segment, segment)
        if segment > self.segment:
            self._cut(step)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add lines of metrics.jsonl. Lines that are no step lines are counted in `bad` and dropped."""
        batch: list[list[Any]] = []
        now: Shape | None = None
        for line in lines:
            value = _parse(line)
            if value is None:
                self.bad += bool(line.strip())
                continue
            step, segment, shape = value["step"], value.get("seg", 0), _shape(value)
            if self._is_superseded(segment, step):
                continue
            row = [step, seconds(value.get("time")), *_figures(value, shape)]
            if not self._is_in_order(segment, step) or not _is_complete(row, shape):
                self.bad += 1
                continue
            if segment != self.segment or shape != now:
                self._flush(now, batch)
                batch, now = [], shape
            if segment > self.segment:
                self._restart(segment, step)
            self._next = step + 1
            if isinstance(value.get("time"), str):
                self.last_time = value["time"]
            batch.append(row)
        self._flush(now, batch)

    def _is_superseded(self, segment: int, step: int) -> bool:
        return any(segment < later and step >= first for later, first in self._starts.items())

    def _is_in_order(self, segment: int, step: int) -> bool:
        """Whether a line continues the run. Accepting a wrong line would reject all later ones."""
        if segment < self.segment or (segment == self.segment and step < self._next) or step >= self._total:
            return False
        # A start uses the number after the highest one in both files, so a gap means a damaged line.
        return self.max_segment < 0 or segment <= max(self.max_segment, self.segment) + 1

    def _restart(self, segment: int, step: int) -> None:
        self.segment, self._next = segment, step
        self.starts[segment] = step
        self._cut(step)

    def _cut(self, step: int) -> None:
        kept = int(np.searchsorted(self.step, step))
        if kept < self.n:
            for column in (self._step, self._time, *self._scalars.values(), *self._folders.values()):
                column.cut(kept)
            self.n = kept

    def _flush(self, shape: Shape | None, batch: list[list[Any]]) -> None:
        if not batch or shape is None:
            return
        scalars, nested, folders = shape
        names = [*scalars, *(f"{key}/{name}" for key, inner in nested for name in inner)]
        block = _as_block(batch, _width(shape))
        self.bad += len(batch) - len(block)
        self._step.put(self.n, block[:, 0])
        self._time.put(self.n, block[:, 1])
        for name, figures in zip(names, block.T[2 : 2 + len(names)], strict=True):
            self._scalars.setdefault(name, _GrowingColumn(None)).put(self.n, figures)
        first = 2 + len(names)
        for at, name in enumerate(folders):
            figures = block[:, first + _WIDTH * at : first + _WIDTH * (at + 1)]
            self._folders.setdefault(name, _GrowingColumn(_WIDTH)).put(self.n, figures)
        self.n += len(block)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or type(value.get("step")) is not int or type(value.get("seg", 0)) is not int:
        return None
    return value if 0 <= value["step"] < MAX_STEP and 0 <= value.get("seg", 0) < MAX_STEP else None


def _shape(value: Mapping[str, Any]) -> Shape:
    folders = value.get("folders")
    scalars = tuple(
        key for key, item in value.items() if not isinstance(item, str | list | dict) and key not in _NOT_SCALARS
    )
    nested = tuple(
        (key, tuple(item)) for key, item in value.items() if isinstance(item, dict) and key not in _NOT_SCALARS
    )
    return scalars, nested, tuple(folders) if isinstance(folders, dict) else ()


def _figures(value: Mapping[str, Any], shape: Shape) -> Iterable[Any]:
    scalars, nested, folders = shape
    row = [value[key] for key in scalars]
    for key, _ in nested:
        row += value[key].values()
    if folders:
        seen = value.get("seen")
        seen = seen if isinstance(seen, dict) else {}
        row += chain.from_iterable(
            (*figures, seen.get(name, figures[0])) if isinstance(figures, list) and figures else ()
            for name, figures in value["folders"].items()
        )
    return row


def _is_complete(row: Sequence[Any], shape: Shape) -> bool:
    """Whether a row has all values of its shape, and only numbers."""
    return len(row) == _width(shape) and all(value is None or isinstance(value, int | float) for value in row)


def _width(shape: Shape) -> int:
    scalars, nested, folders = shape
    return 2 + len(scalars) + sum(len(inner) for _, inner in nested) + _WIDTH * len(folders)


def _as_block(rows: Sequence[Sequence[Any]], width: int) -> Numbers:
    """float64 [rows, width]; None and numbers beyond _MAX_NUMBER become nan. Drops rows with integers beyond it."""
    try:
        block = np.array(rows, dtype=np.float64).reshape(-1, width)
    except OverflowError:
        good = []
        for row in rows:
            with suppress(OverflowError):
                good.append(np.array(row, dtype=np.float64))
        block = np.array(good).reshape(-1, width)
    block[~(np.abs(block) <= _MAX_NUMBER)] = np.nan
    return block


def seconds(text: object) -> float | None:
    """Seconds since the epoch of an ISO time with zone; None if it is no such text."""
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None
    except (ValueError, OverflowError, OSError):
        return None
