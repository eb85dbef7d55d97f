"""No test installs anything on the machine unless it was allowed to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli import ROOT
from tests.installing import advice, install


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an apt-get that only writes down its arguments was asked for; we seem to be root."""
    program, asked = tmp_path / "apt-get", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$*" >> "{asked}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return asked


@pytest.mark.parametrize("switch", [None, "", "0"])
def test_nothing_is_installed_by_itself(asked: Path, switch: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INSTALL_TEST_DEPS", raising=False)
    if switch is not None:
        monkeypatch.setenv("INSTALL_TEST_DEPS", switch)
    install("chromium")
    assert not asked.exists()


def test_the_switch_installs(asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTALL_TEST_DEPS", "1")
    install("slurm-wlm", "munge")
    assert asked.read_text().splitlines() == ["-qq update", "-qq install --yes --no-install-recommends slurm-wlm munge"]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    install("chromium")
    assert "chromium" not in asked.read_text()


def test_a_skip_says_what_to_install() -> None:
    assert advice("slurm-wlm", "munge").startswith("apt-get install slurm-wlm munge ")
    assert "INSTALL_TEST_DEPS=1" in (ROOT / ".ci" / "run").read_text("utf-8")
