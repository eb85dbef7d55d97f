"""How a rank that fails leaves: what it knows is written down, the cause is found among all ranks.

an error here      record it, wait a moment for a better explanation from others, say which rank failed first
nobody goes on     the watchdog's verdict: stacks, record, exit code 4
"""

from __future__ import annotations

import logging
import time
import traceback
from dataclasses import replace
from pathlib import Path

from internlm_lite.config.view import masked
from internlm_lite.errors import HANG, INTERRUPTED, InternLMError, PeerLostError
from internlm_lite.faults.beats import Beat, Verdict
from internlm_lite.faults.failure import Failure, read_failures, record, summary
from internlm_lite.faults.watchdog import Watchdog, write_stacks
from internlm_lite.runtime.place import Place
from internlm_lite.runtime.start import leave_now

logger = logging.getLogger("internlm_lite")

_CAUSE_SECONDS = 3.0
"""A rank that lost another one waits so long for that one's own words, and for its silence to show."""
_ALIKE_SECONDS = 1.0
"""A rank waits so long for others to fail as it does."""
_LAST_WORDS_SECONDS = 15.0
_STORE_SECONDS = 2.0
"""Rank 0 serves the store through which the others learn the verdict."""


def code_of(error: BaseException) -> int:
    """The exit code that an error stands for."""
    if isinstance(error, InternLMError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


class Ending:
    """Of one rank. `folder` is known once the run folder is agreed on; without it nothing is written."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self.folder: Path | None = None
        self.watchdog: Watchdog | None = None
        self.told_elsewhere = False
        """A rank before this one says what this one would say."""

    def hang(self, verdict: Verdict) -> None:
        """Called by the watchdog's thread; ends the process."""
        leave_now(HANG, lambda: self._tell_hang(verdict), _LAST_WORDS_SECONDS)

    def _tell_hang(self, verdict: Verdict) -> None:
        place, folder = self._place, self.folder
        guilty = place.rank in verdict.ranks
        logger.error("the job stands still: %s", verdict.why)
        if folder is not None:
            self._write_stacks(folder)
            self._record(folder, "hang", verdict.why, HANG, follows=bool(verdict.ranks) and not guilty)
            for rank in verdict.ranks:  # if it lives, its own record came first, or comes and stays
                record(folder, self._failure("hang", verdict.why, HANG, rank))
        if place.is_main and not place.agent_store:
            time.sleep(_STORE_SECONDS)

    def _write_stacks(self, folder: Path) -> None:
        stacks = folder / "logs" / f"rank-{self._place.rank:05d}.stacks"
        try:
            write_stacks(stacks)
        except OSError as error:
            logger.error("cannot write %s: %s", stacks, error.strerror)
        else:
            logger.error("rank %d: the stacks of its threads are in %s", self._place.rank, stacks)

    def failed(self, error: BaseException) -> None:
        """Write down why this rank ends, and tell who failed first if it was another one."""
        folder, code, kind = self.folder, code_of(error), type(error).__name__
        if folder is None or isinstance(error, KeyboardInterrupt):
            return
        follows = isinstance(error, PeerLostError)
        message = str(masked(str(error)))
        trace = str(masked("".join(traceback.format_exception(error))))
        if follows:
            self._await_cause(folder)
        self._record(folder, kind, message, code, follows, trace)
        if isinstance(error, InternLMError) and not follows:
            self.told_elsewhere = self._await_lower_rank(folder, kind, message)
        failures = read_failures(folder)
        if failures and (failures[0].kind, failures[0].message) != (kind, message):
            logger.error("%s", summary(failures))

    def _await_lower_rank(self, folder: Path, kind: str, message: str) -> bool:
        """Whether a rank before this one failed in the same way, as all do by a wrong path: one of them says so."""
        deadline = time.monotonic() + _ALIKE_SECONDS
        while not self._place.is_main and time.monotonic() < deadline:
            lower = [failure for failure in read_failures(folder) if failure.rank < self._place.rank]
            if any((failure.kind, failure.message) == (kind, message) for failure in lower):
                return True
            time.sleep(0.05)
        return False

    def _await_cause(self, folder: Path) -> None:
        """Until some rank has said why it failed, or is known to be gone without a word."""
        assert self.watchdog is not None, "set before there is a folder"
        deadline = time.monotonic() + _CAUSE_SECONDS + self.watchdog.silence_seconds
        while time.monotonic() < deadline:
            if any(not failure.follows for failure in read_failures(folder)):
                return
            for rank in self.watchdog.silent():
                why = "it is gone without a word: killed, out of memory, or its host is down"
                lost = self._failure("lost", why, PeerLostError.exit_code, rank)
                # Its last beat may be many steps old; it is missed where this rank waits for it.
                here = self.watchdog.where(self._place.rank)
                record(folder, replace(lost, step=here.step, phase=here.phase) if here else lost)
            time.sleep(0.1)

    def _record(self, folder: Path, kind: str, message: str, code: int, follows: bool, trace: str = "") -> None:
        record(folder, self._failure(kind, message, code, self._place.rank, follows, trace))

    def _failure(
        self, kind: str, message: str, code: int, rank: int, follows: bool = False, trace: str = ""
    ) -> Failure:
        seen = self.watchdog.where(rank) if self.watchdog else None
        here = seen or Beat(0, "starting", None, 0, "an unknown host")
        return Failure(rank, here.host, here.step, here.phase, kind, message, code, follows, trace)
