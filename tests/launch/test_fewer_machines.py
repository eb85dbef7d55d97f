"""A machine goes, and the job goes on with those that are left: same global batch, same curve."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from internlm_lite.monitor.jsonl import read_objects
from tests import cli
from tests.cli import ROOT
from tests.launch.curves import joined_curve
from tests.ports import free_port
from tests.steps import read_metrics


class Machines:
    """Agents of torchrun that meet as on several machines, for any number from one to two."""

    def __init__(self, folder: Path, shared_store: bool = False) -> None:
        """`shared_store`: agents serve one to their ranks, as without launch/; who comes later cannot join then."""
        self.folder, self.port, self.shared_store = folder, free_port(), shared_store
        self.agents: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Machines:
        return self

    def __exit__(self, *_: object) -> None:
        for agent in self.agents:
            if agent.poll() is None:
                self.lose(agent)

    def start(self) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{self.port}", "--rdzv-id=test"]
        command += ["--rdzv-conf=keep_alive_interval=1,last_call_timeout=5", "--max-restarts=1", str(ROOT / "train.py")]
        command += ["--config", "config.py", "--device=cpu", "STEPS=100000", "MICRO_NUM=8"]
        command += ["ckpt.checkpoint_every=10", "ckpt.stop_file_path=stop", "--resume", "none"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(not self.shared_store))
        with (self.folder / f"agent-{len(self.agents)}.log").open("wb") as log:
            self.agents.append(subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=environment))

    def lose(self, agent: subprocess.Popen[bytes]) -> None:
        """With all its processes, as when the power fails."""
        self.lose_ranks(agent)
        agent.kill()
        agent.wait()

    def lose_ranks(self, agent: subprocess.Popen[bytes]) -> None:
        for process in psutil.Process(agent.pid).children(recursive=True):
            process.kill()

    def serves(self, agent: subprocess.Popen[bytes]) -> bool:
        """Whether this is where the agents meet."""
        return any(
            one.laddr.port == self.port and one.status == "LISTEN"
            for one in psutil.Process(agent.pid).net_connections()
        )

    def output(self) -> str:
        return "\n".join(log.read_text()[-3000:] for log in sorted(self.folder.glob("agent-*.log")))


def latest(folder: Path) -> Path:
    return folder / "RUN" / "launch" / "latest"


def starts(folder: Path) -> list[dict[str, Any]]:
    """The events of that kind of the newest run."""
    file = latest(folder) / "events.jsonl"
    return [event for event in read_objects(file) if event["event"] == "start"] if file.exists() else []


def reached(folder: Path) -> int:
    """Its last step; -1 before the first."""
    file = latest(folder) / "metrics.jsonl"
    return max((line["step"] for line in read_metrics(file)), default=-1) if file.exists() else -1


def until(there: Callable[[], bool], machines: Machines) -> None:
    deadline = time.monotonic() + 150
    while not there():
        assert time.monotonic() < deadline, machines.output()
        time.sleep(0.1)


@pytest.mark.timeout(900)
def test_torchrun_starts_the_ranks_of_two_machines_again(folder: Path):
    """One of them fails. The other's agent does not count that as a restart, or does: they meet all the same."""
    with Machines(folder, shared_store=True) as machines:
        machines.start()
        machines.start()
        until(lambda: reached(folder) > 11, machines)
        machines.lose_ranks(machines.agents[1])
        until(lambda: len(starts(folder)) == 2 and reached(folder) > starts(folder)[1]["step"] + 2, machines)
        (folder / "stop").write_text("1")
        assert [agent.wait(60) for agent in machines.agents] == [0, 0], machines.output()
    assert [start["world_size"] for start in starts(folder)] == [2, 2]


@pytest.mark.timeout(900)
def test_torchrun_goes_on_with_one_machine_and_takes_the_other_back(folder: Path):
    with Machines(folder) as machines:
        machines.start()
        machines.start()
        until(lambda: reached(folder) > 15 and any((folder / "saves" / "commits").glob("*.json")), machines)
        gone = next(agent for agent in machines.agents if not machines.serves(agent))
        machines.lose(gone)
        until(lambda: len(starts(folder)) == 2 and reached(folder) > starts(folder)[1]["step"] + 5, machines)
        machines.start()
        until(lambda: len(starts(folder)) == 3 and reached(folder) > starts(folder)[2]["step"] + 5, machines)
        (folder / "stop").write_text("1")
        assert [agent.wait(60) for agent in machines.agents if agent is not gone] == [0, 0], machines.output()
    sizes = [start["world_size"] for start in starts(folder)]
    assert sizes == [2, 1, 2]
    assert starts(folder)[1]["step"] >= 10, "the newest checkpoint"
    # The agent of the machine that was left asks its rank to stop: that saves, and nothing is trained twice.
    alone = [line["step"] for line in read_objects(latest(folder) / "metrics.jsonl") if line["seg"] == 1]
    assert starts(folder)[2]["step"] == alone[-1] + 1
    steps = reached(folder) + 1
    one = cli.run(
        "train.py",
        "--config",
        "config.py",
        "--run-dir",
        "ONE",
        "STEPS=100000",
        "MICRO_NUM=16",
        f"data.total_steps={steps}",
        "ckpt.enable_save_ckpt=False",
        "--resume",
        "none",
        folder=folder,
    )
    assert one.code == 0, one.output
    for ours, theirs in zip(joined_curve(folder), joined_curve(folder, root="ONE"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)
