"""Finds out that a job stands still, names the rank that keeps it, and ends it.

    main thread   enter(phase, step)                                             two assignments: nothing to wait for
    talker        this rank's beat -> store, the verdict <- store; a judge: all ranks' beats <- store      may block
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Protocol

from internlm_lite.faults.beats import Beat, Limits, Verdict, judge

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


class Watchdog:
    """One per rank, used as a context manager. `end(verdict, stacks)` is called in a thread and must not return."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store | None,
        limits: Limits,
        end: Callable[[Verdict], object],
        hostname: str = "",
    ) -> None:
        """`store`: a connection that nobody else uses; None for a world of one. `hostname`: as messages name it."""
        self._rank, self._size, self._store, self._limits, self._end = rank, world_size, store, limits, end
        self._mine = Beat(0, "starting", None, 0, hostname)
        self._period = max(_BEAT_SECONDS, world_size / _RANKS_PER_SECOND)
        self._table: dict[int, Beat] = {}
        self._changed: dict[int, tuple[float, float]] = {}
        self._verdict: Verdict | None = None
        self._heard = time.monotonic()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._watch, name="watchdog", daemon=True)]
        if store is not None:
            self._threads.append(threading.Thread(target=self._talk, name="watchdog-talker", daemon=True))

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

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """Something within the present phase, which goes on afterwards."""
        before = self._mine
        self.enter(phase, before.step)
        yield
        self.enter(before.phase, before.step)

    def where(self, rank: int) -> Beat | None:
        """Where a rank is, as far as this one knows."""
        return self._mine if rank == self._rank else self._table.get(rank)

    @property
    def silence_seconds(self) -> float:
        """Without a beat for so long, a rank counts as silent."""
        return 3 * self._period

    def silent(self) -> list[int]:
        """Ranks whose beats have stopped: all that are known to a judge, to the others at most the store's."""
        late = time.monotonic() - self.silence_seconds
        if self._store is not None and self._heard < late:
            return [0] if self._rank else []  # without the store nothing is known of the others
        return [rank for rank, (_, beaten) in list(self._changed.items()) if beaten < late and rank != self._rank]

    @property
    def judges(self) -> bool:
        return self._rank < 2

    def _talk(self) -> None:
        store = self._store
        assert store is not None
        beats = 0
        while not self._stop.wait(self._period):
            beats += 1
            mine = self._mine
            try:
                store.set(f"beat/{self._rank}", replace(mine, beats=beats).to_json())
                if store.check([_VERDICT]):
                    self._verdict = Verdict.from_json(store.get(_VERDICT))
                if self.judges:
                    self._look(store)
            except RuntimeError:  # torch.distributed's errors are RuntimeErrors: rank 0 is gone, or just ending
                continue
            self._heard = time.monotonic()
        with suppress(RuntimeError):
            store.set(f"beat/{self._rank}", replace(self._mine, phase=_ENDED).to_json())

    def _look(self, store: Store) -> None:
        now = time.monotonic()
        for rank in range(self._size):
            beaten_yet = store.check([f"beat/{rank}"])
            beat = Beat.from_json(store.get(f"beat/{rank}")) if beaten_yet else Beat(0, "starting", None, 0)
            if beat.phase == _ENDED:  # and beats no more
                self._table.pop(rank, None)
                self._changed.pop(rank, None)
                continue
            known = self._table.get(rank)
            progressed, beaten = self._changed.get(rank, (now, now))
            progressed = now if known is None or beat.progress != known.progress else progressed
            beaten = now if known is None or beat.beats != known.beats else beaten
            self._table[rank], self._changed[rank] = beat, (progressed, beaten)

    def _watch(self) -> None:
        progress, since = -1, time.monotonic()
        looked = since
        while not self._stop.wait(self._period / 2):
            now, mine = time.monotonic(), self._mine
            if now - looked > _SUSPENDED_PERIODS * self._period:
                since += now - looked
                self._forgive(now - looked)
            looked = now
            if mine.progress != progress:
                progress, since = mine.progress, now
            verdict = self._verdict or self._judge(now, mine, since)
            if verdict is not None:
                self._publish(verdict)
                self._end(verdict)
                return

    def _forgive(self, seconds: float) -> None:
        """This process was suspended, and so perhaps all were: nobody could make progress meanwhile."""
        self._heard += seconds
        for rank, (progressed, beaten) in list(self._changed.items()):
            self._changed[rank] = (progressed + seconds, beaten + seconds)

    def _judge(self, now: float, mine: Beat, since: float) -> Verdict | None:
        limit = self._limits[mine.phase]
        if self._store is None:
            return judge({self._rank: mine}, {self._rank: (now - since, 0.0)}, self._limits, self._period)
        if now - self._heard > limit:
            return Verdict(
                (0,),
                f"rank 0, which holds the store, has not answered for {now - self._heard:.0f} s",
                mine.phase,
                mine.step,
            )
        if not self.judges or now - self._heard > self.silence_seconds:
            return None  # what a store that is silent itself said last makes all ranks look silent
        patience = _DEPUTY_SECONDS if self._rank else 0.0
        idle = {rank: (now - p - patience, now - b) for rank, (p, b) in list(self._changed.items())}
        return judge(dict(self._table), idle, self._limits, self._period)

    def _publish(self, verdict: Verdict) -> None:
        if self._store is None or verdict is self._verdict:
            return
        teller = threading.Thread(target=self._set_verdict, args=(verdict,), daemon=True)
        teller.start()
        teller.join(self._period)

    def _set_verdict(self, verdict: Verdict) -> None:
        assert self._store is not None
        try:
            self._store.set(_VERDICT, verdict.to_json())
        except RuntimeError as error:
            logger.debug("the verdict could not be told: %s", error)


def unwatched(rank: int) -> Watchdog:
    """For a run that nobody watches: it notes phases and never ends anything."""
    return Watchdog(rank, 1, None, Limits(math.inf, {}), lambda verdict: None)


def write_stacks(path: os.PathLike[str]) -> None:
    """Append the stacks of all threads of this process. Works while the main thread is blocked in C++."""
    with open(path, "ab", buffering=0) as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} pid {os.getpid()}\n".encode())
        faulthandler.dump_traceback(file, all_threads=True)
