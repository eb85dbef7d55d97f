"""Something happens every few steps; the job is started again each time, and ends as if nothing had happened.

The test suite takes a sample; `make chaos` (CHAOS=all) takes 2,000 steps, with a fault about every 20 of them.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.faults.chaos import EVERY, RANKS, Chaos
from tests.faults.trouble import small_disk
from tests.faults.worlds import Job, arguments, curve_of, final_bits

ALL = os.environ.get("CHAOS") == "all"
STEPS = 2000 if ALL else 100
SAMPLE = ("kill one", "damage newest", "term all")
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.mark.timeout(7200)
def test_whatever_happens_the_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    with Job(tmp_path / "undisturbed", RANKS, *arguments(steps=STEPS, every=EVERY)) as job:
        job.await_end(patience=600)
        job.finish()
    with small_disk(tmp_path / "chaos", "256m") if ALL else nullcontext():
        chaos = Chaos(tmp_path / "chaos", STEPS, random.Random(SEED), () if ALL else SAMPLE)
        begin = time.monotonic()
        chaos.run(most_starts=STEPS // 4)
        print(f"\n{chaos}, {time.monotonic() - begin:.0f} s")
        assert curve_of(tmp_path / "chaos") == curve_of(tmp_path / "undisturbed"), "to the bit"
        assert final_bits(tmp_path / "chaos") == final_bits(tmp_path / "undisturbed"), "to the bit"
        assert chaos.happened.total() >= (50 if ALL else len(SAMPLE)) and (ALL or chaos.damaged)
