"""The figures of all step lines as columns of numbers, compact and quick to slice for 50,000 steps of 33 folders.

    scalar  "loss", "grad_norm/1_fp32", ...     float64 [lines]         nan if a line has no value
    folder  "code", ...                         float64 [lines, 4]      tokens learnt, loss, accuracy, tokens seen;
                                                                        nan if a line does not name it: no tokens

A restart repeats steps: lines of an earlier segment, from the first step of a later segment on, are superseded and
dropped, so steps rise strictly. Where a line has no "seen", the tokens seen are the tokens learnt.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
Shape = tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]
"""Keys of a line: scalars, dicts of scalars with their keys. Its folders differ from line to line."""
Folders = dict[str, tuple[Any, ...]]
"""Name -> tokens learnt, loss, accuracy, tokens seen."""

_NOT_SCALARS = {"seg", "step", "time", "folders", "seen"}
_WIDTH = 4
MAX_NUMBER = 1e100
"""Larger numbers count as missing, so that sums and products stay finite."""
_MAX_INT = 10**300
"""A line with a larger integer, which is no float, is invalid."""
MAX_STEP = 10**12
"""A line with a larger step or segment is invalid: accepting it would reject all later ones."""


class _GrowingColumn:
    """A column that doubles its memory as needed; rows that were never written are nan."""

    def __init__(self, width: int | None) -> None:
        self._tail = () if width is None else (width,)
        self._values: Numbers = np.full((0, *self._tail), np.nan)
        self.any = False

    def put(self, start: int, block: Numbers) -> None:
        end = start + len(block)
        if end > len(self._values):
            grown = np.full((max(end, 1024, 2 * len(self._values)), *self._tail), np.nan)
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
        """Name -> columns of a folder, in the order of `declare` and the lines."""
        return {name: column.view(self.n) for name, column in self._folders.items()}

    def declare(self, folders: Iterable[str]) -> None:
        """The folders of the run, of which a line names those with tokens."""
        for name in folders:
            self._folders.setdefault(name, _GrowingColumn(_WIDTH))

    def start_segment(self, segment: int, step: int, total: int) -> None:
        """A start event: from `step` on, lines of earlier segments are superseded. `total`: steps of the whole run."""
        self._total = total if not self._starts else max(total, self._total)
        self._starts[segment] = step
        self.max_segment = max(self.max_segment, segment)
        if segment > self.segment:
            self._cut(step)

    def append(self, lines: Iterable[bytes]) -> None:
        """Add lines of metrics.jsonl. Lines that are no step lines are counted in `bad` and dropped."""
        batch: list[tuple[list[Any], Folders]] = []
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
            folders = _folders(value)
            if not self._is_in_order(segment, step) or folders is None or not _are_numbers(row):
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
            batch.append((row, folders))
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

    def _flush(self, shape: Shape | None, batch: list[tuple[list[Any], Folders]]) -> None:
        if not batch or shape is None:
            return
        scalars, nested = shape
        names = [*scalars, *(f"{key}/{name}" for key, inner in nested for name in inner)]
        step, time, *figures = _as_block([row for row, _ in batch]).T
        self._step.put(self.n, step)
        self._time.put(self.n, time)
        for name, values in zip(names, figures, strict=True):
            self._scalars.setdefault(name, _GrowingColumn(None)).put(self.n, values)
        tables: dict[str, list[tuple[Any, ...]]] = {}
        for at, (_, folders) in enumerate(batch):
            for name, values in folders.items():
                tables.setdefault(name, []).append((at, *values))
        self.declare(tables)
        for name, rows in tables.items():
            table = _as_block(rows)
            block = np.full((len(batch), _WIDTH), np.nan)
            block[table[:, 0].astype(np.intp)] = table[:, 1:]
            self._folders[name].put(self.n, block)
        self.n += len(batch)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or type(value.get("step")) is not int or type(value.get("seg", 0)) is not int:
        return None
    return value if 0 <= value["step"] < MAX_STEP and 0 <= value.get("seg", 0) < MAX_STEP else None


def _shape(value: Mapping[str, Any]) -> Shape:
    scalars = tuple(
        key for key, item in value.items() if not isinstance(item, str | list | dict) and key not in _NOT_SCALARS
    )
    nested = tuple(
        (key, tuple(item)) for key, item in value.items() if isinstance(item, dict) and key not in _NOT_SCALARS
    )
    return scalars, nested


def _figures(value: Mapping[str, Any], shape: Shape) -> Iterable[Any]:
    scalars, nested = shape
    row = [value[key] for key in scalars]
    for key, _ in nested:
        row += value[key].values()
    return row


def _folders(value: Mapping[str, Any]) -> Folders | None:
    """The figures of the folders that a line names; None if they are invalid."""
    folders, seen = value.get("folders"), value.get("seen")
    seen = seen if isinstance(seen, dict) else {}
    if not isinstance(folders, dict):
        return {}
    if not all(isinstance(figures, list) and len(figures) == _WIDTH - 1 for figures in folders.values()):
        return None
    found = {name: (*figures, seen.get(name, figures[0])) for name, figures in folders.items()}
    return found if all(map(_are_numbers, found.values())) else None


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(
        value is None or type(value) is float or (isinstance(value, int) and abs(value) < _MAX_INT) for value in values
    )


def _as_block(rows: Sequence[Sequence[Any]]) -> Numbers:
    """float64 [rows, width]; None and numbers beyond MAX_NUMBER become nan."""
    block = np.array(rows, dtype=np.float64)
    block[~(np.abs(block) <= MAX_NUMBER)] = np.nan
    return block


def seconds(text: object) -> float | None:
    """Seconds since the epoch of an ISO time with zone; None if it is no such text."""
    try:
        return datetime.fromisoformat(text).timestamp() if isinstance(text, str) else None
    except (ValueError, OverflowError, OSError):
        return None
