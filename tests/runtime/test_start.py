"""Real processes meet, miss each other, collide on a port, and end with the right exit code."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.ports import free_port
from tests.runtime.rank import forked
from tests.world import fork_context

REPO = Path(__file__).parents[2]
Environ = Mapping[str, str]


@pytest.fixture
def run(tmp_path):
    """run(seconds, environ, ...): one forked process for each environ; (exit code, output) of each."""

    def start(seconds: float, *environs: Environ) -> list[tuple[int | None, str]]:
        outputs = [tmp_path / f"{index}.txt" for index in range(len(environs))]
        processes = [
            fork_context.Process(target=forked, args=(str(output), dict(environ), seconds), daemon=True)
            for output, environ in zip(outputs, environs, strict=True)
        ]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(60)
        finally:
            for process in processes:
                process.kill()
        return [(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]

    return start


def torch_rank(rank: int, port: int, world: int = 2) -> Environ:
    values = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in values.items()}}


def slurm_task(rank: int) -> Environ:
    values = {"SLURM_PROCID": rank, "SLURM_NTASKS": 2, "SLURM_LOCALID": 0, "SLURM_NODEID": rank, "SLURM_STEP_ID": 0}
    texts = {"SLURM_STEP_NODELIST": "absent-node[1-2]", "SLURM_TASKS_PER_NODE": "1(x2)"}
    texts |= {"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_JOB_ID": str(os.getpid())}
    return texts | {name: str(value) for name, value in values.items()}


def test_two_ranks(run):
    port = free_port()
    ended = run(30, torch_rank(0, port), torch_rank(1, port))
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("sum 3.0 gloo torch" in output for _, output in ended)
    announced = "Distributed environment is initialized, data parallel size: 2, pipeline parallel size: 1, "
    assert [announced + "tensor parallel size: 1" in output for _, output in ended] == [True, False], ended
    assert "start.py:" in ended[0][1] and "in announce_layout -- " in ended[0][1]


def test_two_slurm_tasks_with_unresolvable_names(run):
    ended = run(30, slurm_task(0), slurm_task(1))
    assert [code for code, _ in ended] == [0, 0], ended
    assert all("sum 3.0 gloo slurm" in output for _, output in ended)


def test_single_process(run):
    ((code, output),) = run(30, {})
    assert code == 0 and "sum" not in output and "data parallel size: 1" in output


def test_port_in_use(run):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ((code, output),) = run(3, torch_rank(0, port))
    assert code == 2 and "MeshError: rank 0 on" in output and f"port {port} is in use" in output, output


def test_missing_ranks(run):
    port = free_port()
    ended = run(4, *(torch_rank(rank, port, world=4) for rank in (0, 2)))
    assert [code for code, _ in ended] == [2, 2], ended
    assert f"MeshError: 2 of 4 ranks came to 127.0.0.1:{port} within 4 s; missing: 1, 3;" in ended[0][1], ended


def test_rank_0_missing(run):
    port = free_port()
    ((code, output),) = run(2, torch_rank(1, port))
    assert code == 2 and "MeshError: rank 1 on" in output, output
    assert f"did not reach rank 0 at 127.0.0.1:{port} within 2 s" in output


def test_duplicate_rank(run):
    port = free_port()
    ended = run(4, *(torch_rank(rank, port, world=3) for rank in (0, 1, 1)))
    assert [code for code, _ in ended] == [2, 2, 2], ended
    assert any("rank 1 was started 2 times" in output for _, output in ended), ended


def test_torchrun_restart():
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC_"))}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += [str(REPO / "tests/runtime/rank.py"), "30", "die"]
    environ = kept | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("sum 3.0 gloo torch attempt 0") == 2
    assert done.stdout.count("sum 3.0 gloo torch attempt 1") == 2
