"""Every system call on files of a save fails once. If the error is one that may pass, nobody notices. Else training
learns of it as an error of ours, the next save succeeds, and nothing of the failed one stays.
"""

from __future__ import annotations

from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest

from tests.faults.extent import ALL, some
from tests.faults.strace import Point, count_calls, fail_at, missing
from tests.faults.victims import TROUBLE, TROUBLED
from tests.world import run_world

SAMPLE = 10
UNKNOWN = {"fadvise64": "ENOSYS"}
"""What a file system may not know and nobody needs."""
LASTING = {
    "close": "EDQUOT",
    "fsync": "ENOSPC",
    "getdents64": "EACCES",
    "link": "EDQUOT",
    "mkdir": "ENOSPC",
    "newfstatat": "EACCES",
    "openat": "EMFILE",
    "preadv2": "EACCES",
    "rename": "EROFS",
    "rmdir": "EROFS",
    "unlink": "EROFS",
    "unlinkat": "EROFS",
    "write": "ENOSPC",
}
PASSING = dict(zip(LASTING, cycle(("EIO", "ESTALE", "ETIMEDOUT")))) | UNKNOWN


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
        if call in PASSING
    ]
    chosen = some(points, SAMPLE)
    assert run_world(fail_at, 1, (chosen, PASSING, tmp_path), timeout_seconds=440)[0] == [""] * len(chosen)
    chosen = [point for point in chosen if point.call in LASTING]
    said = run_world(fail_at, 1, (chosen, LASTING, tmp_path), timeout_seconds=440)[0]
    words = Counter("nothing failed" if not error else error.rpartition("(")[2] for error in said)
    print(f"\n{len(said)} calls failed: {dict(words)}")
    if ALL:
        assert len(words) > 2
