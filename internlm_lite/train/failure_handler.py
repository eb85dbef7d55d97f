"""Ends a failing rank: records its error and finds the first cause among all ranks.

an error on this rank     record it, wait a moment for other ranks' records, log which rank failed first
the job hangs             on the watchdog's verdict: write stacks and a record, exit with code 4
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from pathlib import Path

from internlm_lite.config.masking import masked
from internlm_lite.errors import HANG, INTERRUPTED, InternLMError, PeerLostError
from internlm_lite.faults.failure import Failure, read_failures, record, summary
from internlm_lite.faults.heartbeats import Verdict
from internlm_lite.faults.watchdog import unwatched, write_stacks
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.start import leave_now
from internlm_lite.runtime.torchrun import write_agent_error

logger = logging.getLogger("internlm_lite")

_CAUSE_SECONDS = 3.0
"""How long a rank that lost a peer waits for the peer's own record, besides the time until a heartbeat is missed."""
_SAME_FAILURE_SECONDS = 1.0
"""How long a rank waits for others to fail in the same way."""
_LAST_WORDS_SECONDS = 15.0
_VERDICT_SECONDS = 2.0
"""Time for all ranks to read a verdict before one exits, because an exit breaks the others' collectives. Rank 0 serves
the store, so it exits last."""


def code_of(error: BaseException) -> int:
    """The process exit code for an error."""
    if isinstance(error, InternLMError):
        return error.exit_code
    return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


class FailureHandler:
    """Handles the failures of this rank. Until `folder`, the run folder, is set, it writes no records."""

    def __init__(self, dist_env: DistEnv) -> None:
        self._dist_env = dist_env
        self.folder: Path | None = None
        self.watchdog = unwatched(dist_env.rank)
        self.reported_by_peer = False
        """A lower rank failed with the same error and logs it."""
        self._hangs = threading.Event()

    def write_to(self, folder: Path) -> None:
        """Records go to this run folder from now on."""
        self.folder = folder
        self.watchdog.stacks_file = folder / "logs" / f"rank-{self._dist_env.rank:05d}.stacks"

    def hang(self, verdict: Verdict) -> None:
        """Report the verdict and end the process. Called by the watchdog's thread."""
        self._hangs.set()
        leave_now(HANG, lambda: self._report_hang(verdict), _LAST_WORDS_SECONDS)

    def _report_hang(self, verdict: Verdict) -> None:
        rank, folder = self._dist_env.rank, self.folder
        logger.error("the job stands still: %s", verdict.why)
        follows = bool(verdict.ranks) and rank not in verdict.ranks
        write_agent_error(self._dist_env.error_file, f"the job stands still: {verdict.why}", follows=follows)
        if folder is not None:
            self._write_stacks()
            self._record(folder, "hang", verdict.why, HANG, follows=follows)
            for culprit, host in zip(verdict.ranks, verdict.hosts, strict=True):
                where = (host, verdict.step, verdict.phase)
                record(folder, Failure(culprit, *where, "hang", verdict.why, HANG, follows=False, guessed=True))
        time.sleep(max(_VERDICT_SECONDS, self.watchdog.silence_seconds) * (2 if self._dist_env.is_main else 1))

    def log(self, error: BaseException) -> None:
        """Log why this process ends, unless a lower rank logs the same error."""
        if isinstance(error, KeyboardInterrupt):
            logger.error("interrupted; started again, the run goes on from its newest checkpoint if it has written one")
        elif isinstance(error, SystemExit):
            what = f"something called sys.exit({error.code!r}) in the middle of the run"
            logger.error(f"rank {self._dist_env.rank} failed: {what}")
        elif not isinstance(error, InternLMError):
            logger.error(f"rank {self._dist_env.rank} failed", exc_info=error)
        elif not self.reported_by_peer:
            logger.error(f"{type(error).__name__}: {error}")

    def _write_stacks(self) -> None:
        stacks = self.watchdog.stacks_file
        assert stacks is not None
        try:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            write_stacks(stacks)
        except OSError as error:
            logger.error("cannot write %s: %s", stacks, error.strerror)
        else:
            logger.error("rank %d: the stacks of its threads are in %s", self._dist_env.rank, stacks)

    def failed(self, error: BaseException) -> None:
        """Record why this rank ends, and log which rank failed first if it was another one. Blocks for seconds."""
        if isinstance(error, PeerLostError) and self._hangs.is_set():
            time.sleep(_LAST_WORDS_SECONDS)  # the peer left because of a hang: `hang` ends this process meanwhile
        folder, code, kind = self.folder, code_of(error), type(error).__name__
        if folder is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self._record(folder, "interrupted", "by Ctrl-C", code, follows=False)
            return
        lost = isinstance(error, PeerLostError)
        culprits = error.culprit_ranks if isinstance(error, InternLMError) else ()
        follows = lost or (bool(culprits) and self._dist_env.rank not in culprits)
        message = str(masked(str(error)))
        trace = str(masked("".join(traceback.format_exception(error))))
        if follows:
            self._await_cause(folder)
        self._record(folder, kind, message, code, follows=follows, trace=trace)
        if isinstance(error, InternLMError) and not lost:
            self.reported_by_peer = self._await_lower_rank(folder, kind, message)
        failures = read_failures(folder)
        if failures and (failures[0].kind, failures[0].message) != (kind, message):
            logger.error("%s", summary(failures))

    def _await_lower_rank(self, folder: Path, kind: str, message: str) -> bool:
        """Whether a lower rank failed with the same error (such as a wrong path): only the lowest rank logs it."""
        deadline = time.monotonic() + _SAME_FAILURE_SECONDS
        while not self._dist_env.is_main and time.monotonic() < deadline:
            lower = [failure for failure in read_failures(folder) if failure.rank < self._dist_env.rank]
            if any((failure.kind, failure.message) == (kind, message) for failure in lower):
                return True
            time.sleep(0.05)
        return False

    def _await_cause(self, folder: Path) -> None:
        """Wait until another rank has recorded its failure, or record for it that its heartbeat stopped."""
        deadline = time.monotonic() + _CAUSE_SECONDS + self.watchdog.silence_seconds
        here, why = self.watchdog.here, "it is gone without a word: killed, out of memory, or its host is down"
        while time.monotonic() < deadline:
            if any(not failure.follows and failure.rank != self._dist_env.rank for failure in read_failures(folder)):
                return
            for rank in self.watchdog.silent():
                # Recorded with this rank's step and phase, because the lost rank's last beat may be many steps old.
                where = (self.watchdog.host_of(rank), here.step, here.phase)
                code = PeerLostError.exit_code
                record(folder, Failure(rank, *where, "lost", why, code, follows=False, guessed=True))
            time.sleep(0.1)

    def _record(self, folder: Path, kind: str, message: str, code: int, *, follows: bool, trace: str = "") -> None:
        here = self.watchdog.here
        where = (self._dist_env.rank, here.host, here.step, here.phase)
        record(folder, Failure(*where, kind, message, code, follows, trace))
