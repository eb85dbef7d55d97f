"""tools/doctor.py as users start it: alone, in ranks that differ, under torchrun, under a real Slurm."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from internlm_lite.apps.doctor import rank_info
from internlm_lite.apps.doctor.diagnose import diagnose
from internlm_lite.runtime.dist_env import read_dist_env
from tests import cli
from tests.cli import ROOT
from tests.ports import free_port
from tests.slurmlab import SlurmLab

TOOL = str(ROOT / "tools" / "doctor.py")


def start(folder: Path, size: int, *arguments: str, ranks: list[dict[str, str]]) -> list[cli.Ended]:
    """One process for each of `ranks`, with these variables of its own, in a world of `size`."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    started = []
    for rank, own in enumerate(ranks):
        environment = {**common, "LOCAL_WORLD_SIZE": str(size), "RANK": str(rank), "LOCAL_RANK": str(rank), **own}
        log = folder / f"{rank}.log"
        args = ("--device", "cpu", *arguments)
        started.append((cli.start("tools/doctor.py", *args, folder=folder, log=log, environment=environment), log))
    return [cli.ended(*one) for one in started]


def test_alone(tmp_path: Path):
    done = cli.run("tools/doctor.py", "--device", "cpu", folder=tmp_path)
    assert done.code == 0, done.output
    assert done.output.startswith("1 rank on 1 host (") and "nothing differs, nothing is wrong" in done.output
    assert done.output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["output.log"]


@pytest.mark.gpu
def test_on_gpus(tmp_path: Path):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    n_gpus = torch.cuda.device_count()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={n_gpus}",
        "--standalone",
        TOOL,
        "--json",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    found = json.loads(done.stdout)
    assert done.returncode == (2 if found["findings"] else 0), done.stderr
    assert {own["device.visible"] for own in found["ranks"]} == {n_gpus}
    assert all(own["device.memory_bytes"] >= own["device.free_bytes"] > 0 for own in found["ranks"])
    assert all(own["versions.driver"] and own["versions.nccl"] and own["versions.cuda"] for own in found["ranks"])
    assert n_gpus == 1 or found["all_reduce"]["bytes_per_second"] > 0


def test_a_device_that_cannot_be_had(tmp_path: Path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "log"
    arguments = ("--device", "cuda")
    done = cli.ended(cli.start("tools/doctor.py", *arguments, folder=tmp_path, log=log, environment=hidden), log)
    assert done.code == 2 and "Traceback" not in done.output
    assert done.output.startswith("WRONG    device: --device cuda: no GPU is visible on host ")
    assert "           -> see the message and nvidia-smi; start one process for each GPU" in done.output
    assert ": 1 thing to fix" in done.output


def test_a_sick_gpu_is_a_finding(monkeypatch: pytest.MonkeyPatch):
    def full(device: torch.device) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(rank_info, "bind_device", lambda dist_env, wanted: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", full)
    found, device = rank_info.rank_info(read_dist_env({}), {}, "auto")
    assert device is None and found["device.name"] is None
    (finding,) = (finding for finding in diagnose([found]) if finding.what == "device")
    assert finding.problem == "CUDA error: out of memory" and "nvidia-smi" in finding.fix


def test_what_differs_between_two_ranks(tmp_path: Path):
    own = [{"NCCL_DEBUG": "WARN", "HF_TOKEN": "hidden"}, {"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "absent0"}]
    main, other = start(tmp_path, 2, "--timeout", "30", ranks=own)
    assert (main.code, other.code, other.output) == (2, 2, "")
    lines = main.output.splitlines()
    assert lines[:4] == [
        "DIFFERS  environment.GLOO_SOCKET_IFNAME",
        f"           not there   [rank 0 on {(host := lines[1].split()[-1].rstrip(']'))}]",
        f"           absent0     [rank 1 on {host}]",
        "           -> export it before srun or torchrun, the same on all hosts",
    ]
    assert "WRONG    network.chosen: GLOO_SOCKET_IFNAME=absent0: no such interface is up; found " in main.output
    assert "DIFFERS  environment.HF_TOKEN" in main.output and "hidden" not in main.output
    assert "WRONG    all-reduce: " in main.output, "gloo cannot use it"
    assert "things to fix" in lines[-1]


def test_json_under_torchrun(tmp_path: Path):
    config = tmp_path / "config.py"
    config.write_text(
        f"_base_ = {str(ROOT / 'configs' / 'tiny.py')!r}\nckpt = dict(enable_save_ckpt=True, "
        "save_ckpt_folder='local:saves', checkpoint_every=10)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master-port={free_port()}"]
    command += [TOOL, "--device", "cpu", "--json", "--config", "config.py", "ckpt.oss_snapshot_freq=5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert [own["rank"] for own in found["ranks"]] == [0, 1] and found["findings"] == []
    assert found["all_reduce"]["backend"] == "gloo" and found["all_reduce"]["bytes_per_second"] > 0
    assert sorted(found["folders"]) == ["run_dir", "save_ckpt_folder", "snapshot_ckpt_folder"]
    assert found["folders"]["save_ckpt_folder"][0]["path"] == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


def test_a_rank_that_never_comes_is_named(tmp_path: Path):
    (main,) = start(tmp_path, 2, "--timeout", "2", ranks=[{}])
    assert main.code == 2
    assert "MeshError: 1 of 2 ranks came to 127.0.0.1:" in main.output and "missing: 1;" in main.output


def test_bad_arguments(tmp_path: Path):
    done = cli.run("tools/doctor.py", "--timeout", "0", folder=tmp_path)
    assert done.code == 2 and "argument --timeout: found '0', expected seconds: a number > 0" in done.output
    done = cli.run("tools/doctor.py", "adam.lr=1", folder=tmp_path)
    assert done.code == 2 and "give --config too" in done.output


def test_under_slurm_on_two_nodes(slurm: SlurmLab, tmp_path: Path):
    task = ["srun", "-N", "2", "-n", "4", "--ntasks-per-node=2", "python", TOOL, "--device", "cpu"]
    fine = slurm.run(*task, folder=tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert fine.returncode == 0, fine.stdout + fine.stderr
    assert fine.stdout.startswith("4 ranks on 2 hosts (a task of srun: SLURM_PROCID=0 is set; node name node1")
    assert "nothing differs, nothing is wrong; all-reduce of 16.00 MiB over gloo: " in fine.stdout
    export = 'case $SLURMD_NODENAME in node2) export NCCL_DEBUG=INFO; ulimit -n 300; esac; exec "$@"'
    sick = slurm.run(*task[:6], "bash", "-c", export, "_", *task[6:], folder=tmp_path, GLOO_SOCKET_IFNAME="lo")
    assert sick.returncode == 2, sick.stdout + sick.stderr
    assert "           INFO        [ranks 2-3 on node2]" in sick.stdout.splitlines()
    assert "           300     [ranks 2-3 on node2]" in sick.stdout.splitlines()
    assert "2 things to fix" in sick.stdout and slurm.until_quiet() == {}
