"""Detects that a job hangs, names the culprit ranks, and ends the job.

    main thread        enter(phase, step): sets attributes, never blocks
    heartbeat thread   writes this rank's heartbeat to the store; reads the verdict and, on judges, all heartbeats;
                       may block together with the store
    monitor thread     ends the process on a verdict, on a rank beyond the limit of its phase, or on a silent store
    LockTimer          ends the process if none of its threads gets the interpreter's lock

Ranks 0 and 1 are judges, the second with a delay, as either may be the one that hangs. Each rank ends with stacks of
all threads in its log folder, a failure record, and exit code 4. Time-outs of collectives could not do that: gloo and
NCCL do not know which rank is missing, and the main thread cannot be interrupted inside them.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from internlm_lite.faults.heartbeats import UNKNOWN_HOST, Heartbeat, Limits, Verdict, diagnose
from internlm_lite.faults.lock_timer import LockTimer
from internlm_lite.faults.waiting import waits_for_others

logger = logging.getLogger("internlm_lite")

_BEAT_SECONDS = 0.5
_RANKS_PER_SECOND = 500
"""Most heartbeats per second at the store; larger worlds send them less often."""
_DEPUTY_SECONDS = 2.0
"""Delay of the second judge."""
_SUSPENDED_PERIODS = 5
"""Periods without a run of the monitor thread that mean the process was suspended, e.g. by `scontrol suspend`."""
_LOCK_PERIODS = 10
"""Periods after the time-out until a rank that holds the interpreter's lock is ended: the others name it before."""
_VERDICT = "verdict"
_ENDED = "ended"
"""Phase in the last heartbeat of a rank that has left the watchdog."""


class Store(Protocol):
    """The methods of torch.distributed.Store that the watchdog uses."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class _Seen:
    """The last heartbeat of a rank, and when its progress and its count last changed."""

    beat: Heartbeat
    progressed: float
    beaten: float


class Watchdog:
    """One per rank, used as a context manager. `end(verdict)` is called in a thread and must not return."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | None,
        limits: Limits,
        end: Callable[[Verdict], object],
        hostname: str = UNKNOWN_HOST,
        *,
        agent_store: bool = False,
    ) -> None:
        """Call it in the thread to watch. `store`: a connection used by nothing else; None: watch nothing.

        `hostname`: for messages. `agent_store`: torchrun's agent serves the store, not rank 0.
        """
        self._rank, self._size, self._store, self._limits, self._end = rank, world_size, store, limits, end
        self._mine = Heartbeat(0, "starting", None, 0, hostname)
        self.stacks_file: Path | None = None
        """Where the stacks of this rank go if it hangs; None: standard error."""
        self._period = max(_BEAT_SECONDS, world_size / _RANKS_PER_SECOND)
        self._server = "torchrun's agent on the host of rank 0" if agent_store else "rank 0"
        self._watched_thread = threading.current_thread()
        self._lock = threading.Lock()
        """Guards replacement of `_seen` by two threads. Its mappings are never modified, so reading needs no lock."""
        self._seen: Mapping[int, _Seen] = {}
        self._hosts: Mapping[int, str] = {}
        self._verdict: Verdict | None = None
        self._contact = time.monotonic()
        self._stop = threading.Event()
        tasks = {} if store is None else {"watchdog": self._monitor, "watchdog-heartbeat": self._send_heartbeats}
        self._threads = [
            threading.Thread(target=task, args=(store,), name=name, daemon=True) for name, task in tasks.items()
        ]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching. A blocked heartbeat thread is not joined; it is a daemon."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Begin a phase; counts as progress. Called by the main thread; never blocks."""
        self._mine = replace(self._mine, progress=self._mine.progress + 1, phase=phase, step=step)

    def report_progress(self) -> None:
        """A part of the phase is done: progress. Main thread only; all ranks need the same number of parts."""
        self._mine = replace(self._mine, progress=self._mine.progress + 1)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """A phase inside the current one, which continues afterwards."""
        before = self._mine
        self.enter(phase, before.step)
        yield
        self.enter(before.phase, before.step)

    @property
    def here(self) -> Heartbeat:
        """The current heartbeat of this rank."""
        return self._mine

    def host_of(self, rank: int) -> str:
        """Host name of a rank. Judges know those of all ranks with heartbeats, other ranks only that of rank 0."""
        return self._mine.host if rank == self._rank else self._hosts.get(rank, UNKNOWN_HOST)

    @property
    def silence_seconds(self) -> float:
        """Seconds without a heartbeat after which a rank counts as silent."""
        return 3 * self._period

    def silent(self) -> list[int]:
        """Ranks without heartbeats: on judges all of them, on other ranks at most the one that serves the store."""
        late = time.monotonic() - self.silence_seconds
        if self._store is not None and self._contact < late:
            return [0] if self._rank else []  # without the store the others are unknown
        return [rank for rank, seen in self._seen.items() if seen.beaten < late and rank != self._rank]

    @property
    def judges(self) -> bool:
        return self._rank < 2

    def _send_heartbeats(self, store: Store) -> None:
        beats, ended = 0, False
        while not ended:
            beats += 1
            mine = replace(self._mine, beats=beats, waits=waits_for_others(self._watched_thread))
            with suppress(RuntimeError):  # torch.distributed raises it when rank 0 has ended or is ending
                store.set(f"beat/{self._rank}", mine.to_json())
                if store.check([_VERDICT]):
                    self._verdict = Verdict.from_json(store.get(_VERDICT))
                if self.judges:
                    self._read_heartbeats(store)
                elif self.host_of(0) == UNKNOWN_HOST:
                    self._hosts = {0: _heartbeat_of(0, store).host}
                self._contact = time.monotonic()
            ended = self._stop.wait(self._period)
        with suppress(RuntimeError):
            store.set(f"beat/{self._rank}", replace(self._mine, phase=_ENDED).to_json())

    def _read_heartbeats(self, store: Store) -> None:
        """On judges: read the heartbeats of all ranks."""
        beats = {rank: beat for rank in range(self._size) if (beat := _heartbeat_of(rank, store)).phase != _ENDED}
        now = time.monotonic()
        with self._lock:
            self._seen = {rank: _seen_now(beat, self._seen.get(rank), now) for rank, beat in beats.items()}
        self._hosts = {**self._hosts, **{rank: beat.host for rank, beat in beats.items()}}

    def _monitor(self, store: Store) -> None:
        with closing(LockTimer(self._limits.usual + _LOCK_PERIODS * self._period)) as timer:
            verdict = self._await_verdict(timer)
        if verdict is not None:
            self._publish(verdict, store)
            self._end(verdict)

    def _await_verdict(self, timer: LockTimer) -> Verdict | None:
        """The verdict on a hanging job; None at the end of the watch."""
        looked = time.monotonic()
        while not self._stop.wait(self._period / 2):
            timer.restart(self.stacks_file)
            now = time.monotonic()
            if now - looked > _SUSPENDED_PERIODS * self._period:
                self._add_time(now - looked)
            looked = now
            if (verdict := self._verdict or self._diagnose(now)) is not None:
                return verdict
        return None

    def _add_time(self, seconds: float) -> None:
        """This process, and perhaps all others, was suspended: do not count that time as idle."""
        self._contact += seconds
        with self._lock:
            self._seen = {
                rank: replace(seen, progressed=seen.progressed + seconds, beaten=seen.beaten + seconds)
                for rank, seen in self._seen.items()
            }

    def _diagnose(self, now: float) -> Verdict | None:
        mine = self._mine
        limit, silence = self._limits[mine.phase], now - self._contact
        if silence > limit:
            why = f"{self._server}, which holds the store, has not answered for {silence:.0f} s: it is stopped, or gone"
            return Verdict((0,), why, mine.phase, mine.step, (self.host_of(0),))
        if not self.judges or silence > self.silence_seconds:
            return None  # the last values of an unreachable store would make all ranks look silent
        patience = _DEPUTY_SECONDS if self._rank else 0.0
        known = self._seen
        table = {rank: seen.beat for rank, seen in known.items()}
        idle = {rank: (now - seen.progressed - patience, now - seen.beaten) for rank, seen in known.items()}
        return diagnose(table, idle, self._limits, self._period)

    def _publish(self, verdict: Verdict, store: Store) -> None:
        if verdict is self._verdict:
            return
        thread = threading.Thread(target=_write_verdict, args=(verdict, store), daemon=True)
        thread.start()
        thread.join(self._period)


def _write_verdict(verdict: Verdict, store: Store) -> None:
    try:
        store.set(_VERDICT, verdict.to_json())
    except RuntimeError as error:
        logger.debug("cannot write the verdict to the store: %s", error)


def _heartbeat_of(rank: int, store: Store) -> Heartbeat:
    """The last heartbeat of a rank."""
    key = f"beat/{rank}"
    return Heartbeat.from_json(store.get(key)) if store.check([key]) else Heartbeat(0, "starting", None, 0)


def _seen_now(beat: Heartbeat, before: _Seen | None, now: float) -> _Seen:
    if before is None:
        return _Seen(beat, now, now)
    progressed = now if beat.progress != before.beat.progress else before.progressed
    return _Seen(beat, progressed, now if beat.beats != before.beat.beats else before.beaten)


def unwatched(rank: int) -> Watchdog:
    """A watchdog that records phases but does not watch, for runs without one."""
    return Watchdog(rank, 1, None, Limits(math.inf, {}), lambda verdict: None)


def write_stacks(path: os.PathLike[str]) -> None:
    """Append the stacks of all threads of this process. Works while the main thread is blocked in C++."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n".encode())
        faulthandler.dump_traceback(file, all_threads=True)
