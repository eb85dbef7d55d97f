"""What ranks tell about themselves, and who is to blame when a job stands still. Plain values and one pure function."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass

UNKNOWN_HOST = "an unknown host"
_MOST_NAMED = 8
_IF_SLOW = "; if it is only slow, raise --timeout"


@dataclass(frozen=True)
class Beat:
    """One rank's sign of life."""

    progress: int
    """Phases entered so far, and parts of them done."""
    phase: str
    step: int | None
    """Index of the step under way; None before the first."""
    beats: int
    """Counts up while the process lives, whatever its main thread does."""
    host: str = UNKNOWN_HOST
    waits: bool = False
    """Its main thread waits for other ranks."""

    def to_json(self) -> str:
        return json.dumps([self.progress, self.phase, self.step, self.beats, self.host, self.waits])

    @staticmethod
    def from_json(data: bytes) -> Beat:
        return Beat(*json.loads(data))


@dataclass(frozen=True)
class Verdict:
    """The job stands still."""

    ranks: tuple[int, ...]
    """Who keeps it; empty: nobody stands out."""
    why: str
    phase: str
    step: int | None
    hosts: tuple[str, ...] = ()
    """Of `ranks`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Verdict:
        said = json.loads(data)
        return Verdict(tuple(said["ranks"]), said["why"], said["phase"], said["step"], tuple(said["hosts"]))


@dataclass(frozen=True)
class Limits:
    """Seconds that a rank may stay in a phase without progress."""

    usual: float
    of: Mapping[str, float]
    """Phases that may take longer, or for ever (inf)."""

    def __getitem__(self, phase: str) -> float:
        return self.of.get(phase, self.usual)


def judge(
    table: Mapping[int, Beat], idle: Mapping[int, tuple[float, float]], limits: Limits, period: float
) -> Verdict | None:
    """None as long as nobody exceeds the limit of its phase, seconds, or waits for one that does not.

    `idle[rank]`: seconds without progress, and without a beat; beats come every `period` seconds. No phase excuses a
    rank without beats, and the last one it told may be over. Named are silent ranks; else of those that do not wait
    for others, or of all if all wait, the furthest behind.
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
    guilty = busy or last
    if overdue.isdisjoint(last) or overdue.isdisjoint(guilty):
        return None  # the others wait for one that may take its time
    if len(guilty) < len(table) or len(table) == 1:
        return _verdict(table, guilty, seconds, "the others wait for it", _IF_SLOW)
    first = table[guilty[0]]
    why = f"all {len(table)} ranks made no progress for {seconds:.0f} s, {_where(first)}: their stacks say where"
    return Verdict((), why + _IF_SLOW, first.phase, first.step)


def _furthest_behind(table: Mapping[int, Beat], ranks: Set[int]) -> list[int]:
    """In order."""
    least = min((table[rank].progress for rank in ranks), default=0)
    return [rank for rank in sorted(ranks) if table[rank].progress == least]


def _verdict(table: Mapping[int, Beat], ranks: list[int], seconds: float, why: str, advice: str = "") -> Verdict:
    named = ", ".join(map(str, ranks[:_MOST_NAMED])) + (", ..." if ranks[_MOST_NAMED:] else "")
    first = table[ranks[0]]
    noun = "rank" if len(ranks) == 1 else "ranks"
    text = f"{noun} {named} made no progress for {seconds:.0f} s, {_where(first)} ({why}){advice}"
    return Verdict(tuple(ranks), text, first.phase, first.step, tuple(table[rank].host for rank in ranks))


def _where(beat: Beat) -> str:
    return f"in phase {beat.phase!r}" + (f" of step {beat.step}" if beat.step is not None else "")
