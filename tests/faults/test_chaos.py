"""Something happens every few steps; the job is started again each time, and ends as if nothing had happened.

The test suite takes a sample; `make chaos` (CHAOS=all) takes 2,000 steps, with a fault about every 20 of them, started
again by a supervisor that looks at what is left each time, and the same 2,000 steps under one torchrun.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.faults.chaos import EVERY, KINDS, RANKS, Chaos, fault
from tests.faults.trouble import small_disk
from tests.faults.worlds import Job, arguments, curve_of, events_in, final_bits, runs, torchrun

ALL = os.environ.get("CHAOS") == "all"
STEPS = 2000 if ALL else 100
SAMPLE = ("kill one", "damage newest", "term all")
UNDER_TORCHRUN = ("kill one", "kill all", "exit one", "raise one")
"""Not SIGTERM, after which a run has ended as it was asked to, nor SIGSTOP, after which torchrun waits for 30 s."""
SEED = int(os.environ.get("CHAOS_SEED", "0"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict[str, str]]:
    """Curve and final bits."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with Job(folder, RANKS, *arguments(steps=STEPS, every=EVERY)) as job:
        job.await_end(patience=600)
        job.finish()
    return curve_of(folder), final_bits(folder)


@pytest.mark.timeout(7200)
def test_random_faults_keep_result(undisturbed: tuple, tmp_path: Path) -> None:
    with small_disk(tmp_path / "chaos", "256m") if ALL else nullcontext():
        chaos = Chaos(tmp_path / "chaos", STEPS, random.Random(SEED), () if ALL else SAMPLE)
        begin = time.monotonic()
        chaos.run(most_starts=STEPS // 4)
        print(f"\n{chaos}, {time.monotonic() - begin:.0f} s")
        assert (curve_of(tmp_path / "chaos"), final_bits(tmp_path / "chaos")) == undisturbed, "to the bit"
        assert chaos.happened.total() >= (50 if ALL else len(SAMPLE)) and (ALL or chaos.damaged)


@pytest.mark.timeout(7200)
def test_random_faults_under_torchrun_keep_result(undisturbed: tuple, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    often = [KINDS[kind] for kind in UNDER_TORCHRUN]
    kinds = rng.choices(UNDER_TORCHRUN, often, k=60) if ALL else ["kill all"]
    faults = "\n".join(fault(kind, rng.randrange(RANKS), rng) for kind in kinds)
    begin = time.monotonic()
    more = arguments(steps=STEPS, every=EVERY)
    torchrun(tmp_path, RANKS, len(kinds), *more, faults=faults, patience=3600 if ALL else 280)
    print(f"\n{STEPS} steps under torchrun, {dict(Counter(kinds))}, {time.monotonic() - begin:.0f} s")
    assert (curve_of(tmp_path), final_bits(tmp_path)) == undisturbed, "to the bit"
    starts = [event for run in runs(tmp_path) for event in events_in(run, "start")]
    assert len(starts) == len(kinds) + 1, "each fault came, and each was followed by a start"
