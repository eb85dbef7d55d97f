"""Heartbeats of ranks, and the diagnosis of a hanging job from them: plain values and one pure function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass

UNKNOWN_HOST = "an unknown host"
_MOST_NAMED = 8
_IF_SLOW = "; if it is only slow, raise --timeout"


@dataclass(frozen=True)
class Heartbeat:
    """The state that a rank publishes at regular intervals."""

    progress: int
    """Increases with each phase entered and each part of a phase done."""
    phase: str
    step: int | None
    """Index of the current step; None before the first."""
    beats: int
    """Increases with each heartbeat while the process runs, even if its main thread is blocked."""
    host: str = UNKNOWN_HOST
    waits: bool = False
    """Whether the main thread waits for other ranks."""

    def to_json(self) -> str:
        return json.dumps([self.progress, self.phase, self.step, self.beats, self.host, self.waits])

    @staticmethod
    def from_json(data: bytes) -> Heartbeat:
        return Heartbeat(*json.loads(data))


@dataclass(frozen=True)
class Verdict:
    """The diagnosis of a hanging job."""

    ranks: tuple[int, ...]
    """The culprits; empty if unknown."""
    why: str
    phase: str
    step: int | None
    hosts: tuple[str, ...] = ()
    """Host names of `ranks`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Verdict:
        values = json.loads(data)
        return Verdict(**{**values, "ranks": tuple(values["ranks"]), "hosts": tuple(values["hosts"])})


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank may stay in a phase without progress."""

    usual: float
    of: Mapping[str, float]
    """Phase -> its own limit in seconds; inf: no limit."""

    def __getitem__(self, phase: str) -> float:
        return self.of.get(phase, self.usual)


def diagnose(
    table: Mapping[int, Heartbeat], idle: Mapping[int, tuple[float, float]], limits: Limits, period: float
) -> Verdict | None:
    """None as long as no rank exceeds the limit of its phase, except while waiting for a rank within its limit.

    `idle[rank]`: seconds without progress, and without a heartbeat; heartbeats come every `period` seconds. A rank
    without heartbeats is never excused by its phase, which may be outdated. Culprits are the silent ranks; else the
    furthest behind of those that do not wait for others, or of all if all wait.
    """
    overdue = {
        rank for rank, beat in table.items() if idle[rank][0] > limits[beat.phase] or idle[rank][1] > limits.usual
    }
    if not overdue:
        return None
    seconds = max(idle[rank][0] for rank in overdue)
    silent = [rank for rank in sorted(overdue) if idle[rank][1] > 5 * period]
    if silent:
        return _verdict(table, silent, seconds, "no sign of life: stopped, starved, or its host is gone")
    last = _furthest_behind(table, set(table))
    busy = _furthest_behind(table, {rank for rank in overdue.union(last) if not table[rank].waits})
    culprits = busy or last
    if overdue.isdisjoint(last) or overdue.isdisjoint(culprits):
        return None  # the others wait for a rank within its limit
    if len(culprits) < len(table) or len(table) == 1:
        return _verdict(table, culprits, seconds, "the others wait for it", _IF_SLOW)
    first = table[culprits[0]]
    why = f"all {len(table)} ranks made no progress for {seconds:.0f} s, {_where(first)}: their stacks say where"
    return Verdict((), why + _IF_SLOW, first.phase, first.step)


def _furthest_behind(table: Mapping[int, Heartbeat], ranks: Set[int]) -> list[int]:
    """Those of `ranks` with the least progress, in rank order."""
    least = min((table[rank].progress for rank in ranks), default=0)
    return [rank for rank in sorted(ranks) if table[rank].progress == least]


def _verdict(table: Mapping[int, Heartbeat], ranks: list[int], seconds: float, why: str, advice: str = "") -> Verdict:
    named = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if ranks[_MOST_NAMED:] else "")
    first = table[ranks[0]]
    noun = "rank" if len(ranks) == 1 else "ranks"
    text = f"{noun} {named} made no progress for {seconds:.0f} s, {_where(first)} ({why}){advice}"
    return Verdict(tuple(ranks), text, first.phase, first.step, tuple(table[rank].host for rank in ranks))


def _where(beat: Heartbeat) -> str:
    return f"in phase {beat.phase!r}" + (f" of step {beat.step}" if beat.step is not None else "")
