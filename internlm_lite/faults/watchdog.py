"""Finds out that a job stands still, names the rank that keeps it, and ends it.

    main thread   enter(phase, step)                                             two assignments: nothing to wait for
    talker        this rank's beat, and whether it waits -> store; the verdict, a judge: all beats <- store    may block
    watcher       verdict there? a rank without progress for longer than its phase allows? the store silent? -> the end

Ranks 0 and 1 are judges, the second one a little more patient: either may be the one that hangs. The end is, on every
rank: the stacks of all threads into its log folder, a failure record, and exit code 4. No error of a blocked collective
could do that: gloo and NCCL do not know who is missing, and the main thread cannot be interrupted inside them.
"""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Protocol

from internlm_lite.faults.beats import UNKNOWN_HOST, Beat, Limits, Verdict, judge
from internlm_lite.faults.waiting import waits_for_others

logger = logging.getLogger("internlm_lite")

_BEAT_SECONDS = 0.5
_RANKS_PER_SECOND = 500
"""Beats a second that a store is asked to take; larger worlds beat less often."""
_DEPUTY_SECONDS = 2.0
_SUSPENDED_PERIODS = 5
"""A watcher that did not run for so long was stopped, as by `scontrol suspend`, together with its process."""
_VERDICT = "verdict"
_ENDED = "ended"
"""Phase of the last beat of a rank that nobody waits for any more."""


class Store(Protocol):
    """The part of torch.distributed.Store that is used."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


@dataclass(frozen=True)
class _Seen:
    """The last beat of a rank, and when its progress and its beats changed last."""

    beat: Beat
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
        agent_store: bool = False,
    ) -> None:
        """`store`: a connection that nobody else uses; None: nothing is watched. Made in the thread that is watched.

        `hostname`: as messages name it. `agent_store`: the store is not rank 0's, but that of torchrun's agent.
        """
        self._rank, self._size, self._store, self._limits, self._end = rank, world_size, store, limits, end
        self._mine = Beat(0, "starting", None, 0, hostname)
        self._period = max(_BEAT_SECONDS, world_size / _RANKS_PER_SECOND)
        self._keeper = "torchrun's agent on the host of rank 0" if agent_store else "rank 0"
        self._watched = threading.current_thread()
        self._lock = threading.Lock()
        """Over replacing `_seen`, which two threads do. None changes a mapping, so reading needs no lock."""
        self._seen: Mapping[int, _Seen] = {}
        self._hosts: Mapping[int, str] = {}
        self._verdict: Verdict | None = None
        self._heard = time.monotonic()
        self._stop = threading.Event()
        tasks = {} if store is None else {"watchdog": self._watch, "watchdog-talker": self._talk}
        self._threads = [
            threading.Thread(target=task, args=(store,), name=name, daemon=True) for name, task in tasks.items()
        ]

    def __enter__(self) -> Watchdog:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No rank is waited for any more; a talker that is blocked is left behind, as a daemon."""
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * self._period)

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread begins something: that is progress."""
        self._mine = replace(self._mine, progress=self._mine.progress + 1, phase=phase, step=step)

    def go_on(self) -> None:
        """The main thread has done one of the parts of its phase, of which all ranks have equally many."""
        self._mine = replace(self._mine, progress=self._mine.progress + 1)

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Something within the present phase, which goes on afterwards."""
        before = self._mine
        self.enter(phase, before.step)
        yield
        self.enter(before.phase, before.step)

    @property
    def here(self) -> Beat:
        """Where this rank is."""
        return self._mine

    def host_of(self, rank: int) -> str:
        """As far as this rank knows: a judge knows all that have beaten, everybody the host of rank 0."""
        return self._mine.host if rank == self._rank else self._hosts.get(rank, UNKNOWN_HOST)

    @property
    def silence_seconds(self) -> float:
        """Without a beat for so long, a rank counts as silent."""
        return 3 * self._period

    def silent(self) -> list[int]:
        """Ranks whose beats have stopped: all that are known to a judge, to the others at most the store's."""
        late = time.monotonic() - self.silence_seconds
        if self._store is not None and self._heard < late:
            return [0] if self._rank else []  # without the store nothing is known of the others
        return [rank for rank, seen in self._seen.items() if seen.beaten < late and rank != self._rank]

    @property
    def judges(self) -> bool:
        return self._rank < 2

    def _talk(self, store: Store) -> None:
        beats, ended = 0, False
        while not ended:
            beats += 1
            mine = replace(self._mine, beats=beats, waits=waits_for_others(self._watched))
            with suppress(RuntimeError):  # torch.distributed's errors are RuntimeErrors: rank 0 is gone, or just ending
                store.set(f"beat/{self._rank}", mine.to_json())
                if store.check([_VERDICT]):
                    self._verdict = Verdict.from_json(store.get(_VERDICT))
                if self.judges:
                    self._look(store)
                elif self.host_of(0) == UNKNOWN_HOST:
                    self._hosts = {0: _beat_of(0, store).host}
                self._heard = time.monotonic()
            ended = self._stop.wait(self._period)
        with suppress(RuntimeError):
            store.set(f"beat/{self._rank}", replace(self._mine, phase=_ENDED).to_json())

    def _look(self, store: Store) -> None:
        """For a judge: the beats of all ranks."""
        beats = {rank: beat for rank in range(self._size) if (beat := _beat_of(rank, store)).phase != _ENDED}
        now = time.monotonic()
        with self._lock:
            self._seen = {rank: _seen_now(beat, self._seen.get(rank), now) for rank, beat in beats.items()}
        self._hosts = {**self._hosts, **{rank: beat.host for rank, beat in beats.items()}}

    def _watch(self, store: Store) -> None:
        looked = time.monotonic()
        while not self._stop.wait(self._period / 2):
            now = time.monotonic()
            if now - looked > _SUSPENDED_PERIODS * self._period:
                self._forgive(now - looked)
            looked = now
            verdict = self._verdict or self._judge(now)
            if verdict is not None:
                self._publish(verdict, store)
                self._end(verdict)
                return

    def _forgive(self, seconds: float) -> None:
        """This process was suspended, and so perhaps all were: nobody could make progress meanwhile."""
        self._heard += seconds
        with self._lock:
            self._seen = {
                rank: replace(seen, progressed=seen.progressed + seconds, beaten=seen.beaten + seconds)
                for rank, seen in self._seen.items()
            }

    def _judge(self, now: float) -> Verdict | None:
        mine = self._mine
        limit, silence = self._limits[mine.phase], now - self._heard
        if silence > limit:
            why = f"{self._keeper}, which holds the store, has not answered for {silence:.0f} s: it is stopped, or gone"
            return Verdict((0,), why, mine.phase, mine.step, (self.host_of(0),))
        if not self.judges or silence > self.silence_seconds:
            return None  # what a store that is silent itself said last makes all ranks look silent
        patience = _DEPUTY_SECONDS if self._rank else 0.0
        known = self._seen
        table = {rank: seen.beat for rank, seen in known.items()}
        idle = {rank: (now - seen.progressed - patience, now - seen.beaten) for rank, seen in known.items()}
        return judge(table, idle, self._limits, self._period)

    def _publish(self, verdict: Verdict, store: Store) -> None:
        if verdict is self._verdict:
            return
        teller = threading.Thread(target=_tell, args=(verdict, store), daemon=True)
        teller.start()
        teller.join(self._period)


def _tell(verdict: Verdict, store: Store) -> None:
    try:
        store.set(_VERDICT, verdict.to_json())
    except RuntimeError as error:
        logger.debug("the verdict could not be told: %s", error)


def _beat_of(rank: int, store: Store) -> Beat:
    """What a rank told last."""
    key = f"beat/{rank}"
    return Beat.from_json(store.get(key)) if store.check([key]) else Beat(0, "starting", None, 0)


def _seen_now(beat: Beat, before: _Seen | None, now: float) -> _Seen:
    if before is None:
        return _Seen(beat, now, now)
    progressed = now if beat.progress != before.beat.progress else before.progressed
    return _Seen(beat, progressed, now if beat.beats != before.beat.beats else before.beaten)


def unwatched(rank: int) -> Watchdog:
    """For a run that nobody watches: it notes phases and never ends anything."""
    return Watchdog(rank, 1, None, Limits(math.inf, {}), lambda verdict: None)


def write_stacks(path: os.PathLike[str]) -> None:
    """Append the stacks of all threads of this process. Works while the main thread is blocked in C++."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n".encode())
        faulthandler.dump_traceback(file, all_threads=True)
