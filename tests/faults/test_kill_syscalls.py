"""SIGKILL before every system call of a save: afterwards there is the old checkpoint or the new one, whole."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.extent import ALL, some
from tests.faults.strace import Outcome, Point, count_calls, kill_at, missing
from tests.faults.victims import NEW, OLD, SCENARIOS
from tests.world import run_world

SAMPLE = 8
"""Points of each scenario in the test suite."""
UNSTEADY = {"futex", "mprotect", "mmap", "munmap", "madvise", "brk", "restart_syscall", "exit_group"}
UNSTEADY |= {"poll", "ppoll"}
"""Calls of the interpreter and the allocator, and the wait for strace: not as many in every run."""


@pytest.fixture(scope="module", autouse=True)
def strace() -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_any_system_call_there_is_the_old_or_the_new_checkpoint(scenario: str, tmp_path: Path) -> None:
    counts = run_world(count_calls, 1, (scenario, tmp_path))[0]
    points = [Point(scenario, call, number + 1) for call, times in counts.items() for number in range(times)]
    chosen = some([point for point in points if ALL or point.call not in UNSTEADY], SAMPLE)
    outcomes: list[Outcome] = run_world(kill_at, 1, (chosen, tmp_path), timeout_seconds=880)[0]
    killed = [outcome for outcome in outcomes if outcome.killed]
    found = Counter(outcome.step for outcome in killed)
    calls = " ".join(f"{call}:{times}" for call, times in counts.items())
    missed = [outcome.point for outcome in outcomes if not outcome.killed and outcome.point.call not in UNSTEADY]
    print(f"\n{scenario}: {len(killed)} of {len(chosen)} kills; old {found[OLD]}, new {found[NEW]}; {calls}")
    print(f"steady calls missed: {len(missed)}")
    assert len(missed) <= 0.05 * len(chosen) + 1, missed
    if ALL:
        assert found[OLD] and found[NEW]
