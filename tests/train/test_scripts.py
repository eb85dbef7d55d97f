"""The launch scripts start what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.cli import ROOT


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_torchrun_script_trains(tmp_path: Path):
    arguments = ["configs/tiny.py", "--run-dir", str(tmp_path), "--device", "cpu", "TOTAL_STEPS=2", "data.micro_num=1"]
    done = run("torchrun.sh", *arguments, NPROC="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data parallel size: 2" in done.stdout
    assert "step=1 " in done.stdout


def test_slurm_script_hands_everything_to_srun(tmp_path: Path):
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(
        "slurm.sh", "configs/tiny.py", "TOTAL_STEPS=2", SLURM_SUBMIT_DIR=str(ROOT), SLURM_CPUS_PER_TASK="8", PATH=path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "--kill-on-bad-exit=1", "--cpus-per-task=8", "python", "train.py", "--launcher", "slurm",
        "--config", "configs/tiny.py", "TOTAL_STEPS=2",
    ]  # fmt: skip


def test_scripts_without_a_config_say_what_they_want():
    for script in ("torchrun.sh", "slurm.sh"):
        done = run(script)
        assert done.returncode == 2
        assert "CONFIG" in done.stderr
