"""launch/torchrun_nodes.sh on two hosts with a network between them, which breaks in the middle and is mended."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import ROOT
from tests.launch.conftest import prepare
from tests.launch.curves import joined_curve
from tests.netlab import NetLab, missing_parts
from tests.steps import read_metrics


@pytest.fixture
def lab() -> Iterator[NetLab]:
    if missing := missing_parts():
        pytest.skip(missing)
    with NetLab() as made:
        yield made
        assert made.processes() == {}


def start(lab: NetLab, folder: Path, *changes: str) -> list:
    """The same command on both hosts, which share `folder`; (process, log) of each."""
    command = ["bash", str(ROOT / "launch" / "torchrun_nodes.sh"), str(folder / "config.py"), "--device", "cpu"]
    command += ["--run-dir", str(folder / "RUN"), f"data.train_folder='{folder}/corpus'"]
    command += [f"ckpt.save_ckpt_folder='local:{folder}/saves'", *changes]
    environment = {"MEET": lab.names[0], "NNODES": "2", "NPROC": "1", "NETWORK": "eth0", "OMP_NUM_THREADS": "1"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"}
    logs = [folder / f"host-{host}.log" for host in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    return [(lab.start(host, *command, log=log, folder=folder, **environment), log) for host, log in enumerate(logs)]


def ended(hosts: list, seconds: float) -> tuple[list[int], str]:
    """Exit codes of these hosts, and all that was said there."""
    deadline = time.monotonic() + seconds
    for process, _ in hosts:
        process.wait(max(0.1, deadline - time.monotonic()))
    return [process.returncode for process, _ in hosts], "\n".join(log.read_text() for _, log in hosts)


@pytest.mark.timeout(900)
def test_two_hosts_and_a_link_that_goes_down(lab: NetLab, tmp_path: Path):
    folder = prepare(tmp_path / "broken")
    endless = ["STEPS=100000", "MICRO_NUM=4", "ckpt.checkpoint_every=10", "--timeout", "10"]
    hosts = start(lab, folder, *endless)
    run = folder / "RUN" / "launch" / "latest" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (run.exists() and len(read_metrics(run)) > 15):
        assert time.monotonic() < deadline, ended(hosts, 0.1)[1]
        time.sleep(0.1)
    lab.link(1, up=False)
    codes, text = ended(hosts[:1], 120)
    assert codes == [1] and "exitcode  : 4" in text, text
    # "saving" may take four times as long
    named = r"the job stands still: rank 1 made no progress for \d+ s, in phase '(data|training|updating|saving)'"
    assert re.search(named, text), text
    deadline = time.monotonic() + 120
    while any("train.py --launcher" in command and "--rdzv" not in command for command in lab.processes(1).values()):
        assert time.monotonic() < deadline, lab.processes(1)
        time.sleep(0.1)
    named = r"the job stands still: rank 0, which holds the store, has not answered for \d+ s"
    assert re.search(named, hosts[1][1].read_text())
    told = json.loads((run.parent / "FAILED.json").read_text())
    assert told["cause"]["kind"] == "hang" and told["cause"]["exit_code"] == 4, told
    lab.kill(1)  # torchrun itself, without processes, waits for minutes for the machine it cannot reach
    reached = len(joined_curve(folder))

    lab.link(1, up=True)
    codes, text = ended(start(lab, folder, f"STEPS={reached + 10}", "MICRO_NUM=4"), 180)
    assert codes == [0, 0], text
    assert "loaded checkpoint" in text or "LOAD PLAN" in text, text
    assert len(joined_curve(folder)) == reached + 10
