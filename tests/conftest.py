"""FORBID_SKIPS=1 (set by .ci/run) turns every skip into a failure: a missing dependency must not hide tests.

Tests marked `gpu` or `nvme` may still be skipped: a machine without a GPU cannot run them, or compiles for minutes.

Tests are marked `slow`, which `make test-fast` leaves out, by their folder (SLOW_FOLDERS) or their fixtures
(SLOW_FIXTURES).
"""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import torch

from tests.leftovers import nothing_is_left_behind
from tests.slurmlab import slurm

__all__ = ["nothing_is_left_behind", "slurm"]

SLOW_FOLDERS = {"bench", "faults", "launch", "tools", "train"}
"""Folders of tests that start jobs, launchers, programs, or whole layouts."""
SLOW_FIXTURES = {"browser", "slurm", "s3_process"}
"""Fixtures that start Chromium, a Slurm cluster, an S3 server."""
MAY_SKIP = ("gpu", "nvme")
HERE = Path(__file__).parent
FORBID_SKIPS = os.environ.get("FORBID_SKIPS", "") not in ("", "0")

# The same examples in every run, without a time limit.
hypothesis.settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")
# Tensors are tiny: a second thread only waits, and ranks need the cores. Child processes read it when they load torch,
# as does the fork server; the children of the fork server cannot change it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: {reason} (FORBID_SKIPS is set: install what is missing)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        if asked & SLOW_FIXTURES or SLOW_FOLDERS & set(item.path.relative_to(HERE).parts):
            item.add_marker("slow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    may_skip = hasattr(report, "wasxfail") or any(item.get_closest_marker(name) for name in MAY_SKIP)
    if FORBID_SKIPS and report.skipped and not may_skip:
        _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    if FORBID_SKIPS and report.skipped:
        _refuse(report)
    return report


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Seed torch before each test: its random numbers do not depend on earlier tests."""
    torch.manual_seed(0)
