"""torchrun on two hosts, each with its own network: the curve of one process, and a link that goes down."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.monitor.jsonl import read_metrics
from tests.launch.hosts import Hosts, missing_parts

ROOT = Path(__file__).parents[2]
PORT = "29417"
ENVIRON = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := missing_parts():
        pytest.skip(reason)
    with Hosts(2) as made:
        yield made


def _train(folder: Path, *arguments: str) -> list[str]:
    return [str(ROOT / "train.py"), "--config", str(ROOT / "configs/tiny.py"), "--run-dir", str(folder), *arguments]


def _start(hosts: Hosts, folder: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    started = []
    for host in (1, 2):
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        agent += [f"--node-rank={host - 1}", f"--master-addr={hosts.address(1)}", f"--master-port={PORT}"]
        log = folder / f"host-{host}.log"
        started.append(hosts.start(host, [*agent, *_train(folder, *arguments)], folder, log, ENVIRON))
    return started


def _end(agents: list[subprocess.Popen[bytes]]) -> None:
    for agent in agents:
        with suppress(ProcessLookupError):
            os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()


def _logs(folder: Path) -> str:
    return "\n".join(log.read_text(errors="replace")[-3000:] for log in sorted(folder.glob("host-*.log")))


def _curve(folder: Path) -> list[Any]:
    return [step["loss"] for step in read_metrics(folder / "tiny" / "latest" / "metrics.jsonl")]


def test_two_hosts_give_the_curve_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    agents = _start(hosts, tmp_path, "model.dtype=torch.float64", "data.micro_num=1")
    try:
        codes = [agent.wait(120) for agent in agents]
    finally:
        _end(agents)
    assert codes == [0, 0], _logs(tmp_path)
    assert json.loads((tmp_path / "tiny" / "latest" / "env.json").read_text())["host"] == hosts.names[0]
    alone = tmp_path / "alone"
    command = [sys.executable, *_train(alone, "model.dtype=torch.float64")]
    subprocess.run(command, check=True, env={**os.environ, **ENVIRON}, capture_output=True, timeout=120)
    assert _curve(tmp_path) == pytest.approx(_curve(alone), rel=1e-12)


def test_a_link_that_goes_down_ends_the_job_and_names_who_is_lost(hosts: Hosts, tmp_path: Path) -> None:
    agents = _start(hosts, tmp_path, "TOTAL_STEPS=100000", "--timeout", "10")
    try:
        deadline = time.monotonic() + 90
        while "step=20 " not in (tmp_path / "host-1.log").read_text(errors="replace"):
            assert all(agent.poll() is None for agent in agents) and time.monotonic() < deadline, _logs(tmp_path)
            time.sleep(0.1)
        hosts.cut(2)
        assert agents[0].wait(90) != 0
        assert agents[1].wait(90) != 0
    finally:
        _end(agents)
    failed = json.loads((tmp_path / "tiny" / "latest" / "FAILED.json").read_text())
    told = [failed["cause"], *failed["others"]]
    assert {one["rank"] for one in told} == {0, 1} and all(one["exit_code"] in (4, 5) for one in told)
    (cause,) = [one for one in told if one["rank"] == 1]
    assert cause["host"] == hosts.names[1] and cause["kind"] in ("hang", "lost"), told
    assert "no sign of life" in cause["message"] or "gone without a word" in cause["message"]
