"""Every system call on files of a save fails once: training learns of it as an error of ours, the next save succeeds,
and nothing of the failed one stays.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.faults.extent import ALL, some
from tests.faults.strace import Point, count_calls, fail_at, missing
from tests.faults.victims import TROUBLE, TROUBLED
from tests.world import run_world

SAMPLE = 10
ERRORS = {
    "close": "EIO",
    "fsync": "EIO",
    "getdents64": "EIO",
    "link": "EIO",
    "mkdir": "ENOSPC",
    "newfstatat": "EIO",
    "openat": "EIO",
    "preadv2": "EIO",
    "rename": "EIO",
    "rmdir": "EIO",
    "unlink": "EIO",
    "unlinkat": "EIO",
    "write": "ENOSPC",
}


@pytest.mark.timeout(900)
def test_failing_system_calls(tmp_path: Path) -> None:
    reason = missing()
    if reason:
        pytest.skip(reason)
    counts = run_world(count_calls, 1, (TROUBLE, tmp_path))[0]
    points = [
        Point(TROUBLE, call, number + 1)
        for call, times in counts.items()
        for number in range(-(-times // len(TROUBLED)))
        if call in ERRORS
    ]
    chosen = some(points, SAMPLE)
    said = run_world(fail_at, 1, (chosen, ERRORS, tmp_path), timeout_seconds=880)[0]
    words = Counter("nothing failed" if not error else error.rpartition("(")[2] for error in said)
    print(f"\n{len(said)} calls failed: {dict(words)}")
    if ALL:
        assert len(words) > 2
