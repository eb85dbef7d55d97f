"""How long the watchdog of a job waits."""

from __future__ import annotations

from internlm_lite.checkpoint.storage.run_lock import LEASE_SECONDS
from internlm_lite.faults.heartbeats import Heartbeat, diagnose
from internlm_lite.train.job import LOCKING, limits_of


def test_rank_0_may_watch_the_lock_of_a_dead_run_however_short_the_timeout() -> None:
    limits = limits_of(10)
    assert (limits.usual, limits["saving"]) == (10, 40)
    table = {rank: Heartbeat(2, LOCKING, None, 200, waits=rank > 0) for rank in range(2)}
    longest = 1.9 * LEASE_SECONDS
    assert diagnose(table, dict.fromkeys(table, (longest, 0.1)), limits, 0.5) is None
    verdict = diagnose(table, dict.fromkeys(table, (longest + 60, 0.1)), limits, 0.5)
    assert verdict is not None and verdict.ranks == (0,) and "'taking the save folders'" in verdict.why
