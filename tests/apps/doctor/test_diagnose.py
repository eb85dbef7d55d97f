"""Everything that differs or is wrong is a finding with its ranks; nothing else is."""

from __future__ import annotations

from typing import Any

import pytest

from internlm_lite.apps.doctor.clocks import Offset
from internlm_lite.apps.doctor.diagnose import Finding, diagnose, diagnose_clocks, diagnose_folder

GIB = 2**30


def info(rank: int) -> dict[str, Any]:
    """Of one of four ranks on two hosts with two GPUs each."""
    return {
        "rank": rank,
        "host": "ab"[rank // 2],
        "local_rank": rank % 2,
        "local_world_size": 2,
        "device.asked": "auto",
        "device.problem": None,
        "device.name": "NVIDIA H200",
        "device.visible": 2,
        "device.memory_bytes": 140 * GIB,
        "device.free_bytes": 139 * GIB,
        "versions.torch": "2.13.0",
        "versions.driver": "580.95",
        "versions.python_path": "/shared/.venv/bin/python",
        "host.cpu": "EPYC",
        "host.cores_of_rank": 8,
        "host.memory_bytes": 2000 * GIB + rank // 2,
        "host.gpus_there": 2,
        "network.interfaces": {"lo": 0, "eth0": 10000, "ib0": 400000},
        "network.own_address": f"10.0.0.{rank // 2 + 1}",
        "network.infiniband": {"mlx5_0/1": "ACTIVE 400 Gb/sec (4X NDR)"},
        "network.chosen": {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"},
        "limits.open_files": 65536,
        "limits.locked_memory": None,
        "limits.shared_memory": 64 * GIB,
        "environment.NCCL_DEBUG": "WARN",
    }


def judged(*ranks: int, **changes: Any) -> list[Finding]:
    """With info of `ranks` changed; `__` stands for a dot."""
    world = [info(rank) for rank in range(4)]
    for rank in ranks:
        world[rank] |= {name.replace("__", "."): value for name, value in changes.items()}
    return diagnose(world)


def test_four_equal_ranks_need_nothing():
    assert judged() == []
    assert judged(2, device__memory_bytes=140 * GIB + 2**20, limits__shared_memory=65 * GIB) == [], "about the same"


@pytest.mark.parametrize(
    ("name", "value", "shown", "words"),
    [
        ("versions.torch", "2.12.0", "2.12.0", "make venv"),
        ("versions.driver", None, "not there", "the same NVIDIA driver"),
        ("versions.python_path", "/usr/bin/python3", "/usr/bin/python3", "the same environment"),
        ("host.cpu", "Xeon", "Xeon", "--constraint"),
        ("host.cores_of_rank", 4, "4", "--cpus-per-task"),
        ("device.name", "NVIDIA A100", "NVIDIA A100", "one kind of GPU"),
        ("device.memory_bytes", 70 * GIB, "70 GiB", "partitioned"),
        ("network.infiniband", {}, "none", "ibstat"),
        ("limits.locked_memory", 2**37, "128 GiB", "LimitMEMLOCK"),
        ("limits.open_files", 4096, "4096", "LimitNOFILE"),
        ("environment.NCCL_DEBUG", "INFO", "INFO", "export it"),
        ("environment.HTTPS_PROXY", "set", "set", "export it"),
    ],
)
def test_what_differs(name, value, shown, words):
    (finding,) = judged(2, **{name.replace(".", "__"): value})
    assert (finding.what, finding.problem) == (name, "")
    assert finding.values[shown] == (2,) and sorted(finding.values.values()) == [(0, 1, 3), (2,)]
    assert words in finding.fix


@pytest.mark.parametrize(
    ("changes", "what", "words"),
    [
        ({"device__problem": "host b: 2 processes but 1 visible GPUs"}, "device", "2 processes but 1 visible"),
        ({"device__free_bytes": 100 * GIB}, "device.free", "only 100.00 GiB of 140.00 GiB are free"),
        ({"limits__locked_memory": None, "limits__shared_memory": 64 * 2**20}, "limits.shared_memory", "64.00 MiB"),
        ({"limits__locked_memory": 2**16}, "limits.locked_memory", "64.00 KiB of locked memory"),
        ({"limits__open_files": 256}, "limits.open_files", "256 open files, expected at least 272 for 4 ranks"),
        ({"host__cores_of_rank": 1}, "host.cores", "1 core for a rank with a GPU"),
        (
            {"network__chosen": {"NCCL_SOCKET_IFNAME": "en"}},
            "network.chosen",
            "NCCL_SOCKET_IFNAME=en: no such interface",
        ),
        ({"network__chosen": {"GLOO_SOCKET_IFNAME": "eth"}}, "network.chosen", "GLOO_SOCKET_IFNAME=eth"),
        ({"network__chosen": {}, "network__own_address": "127.0.1.1"}, "network.own_address", "means 127.0.1.1 to it"),
        ({"network__infiniband": {"a/1": "ACTIVE 400", "b/1": "DOWN 10"}}, "network.infiniband", "ports b/1 are down"),
    ],
)
def test_what_is_wrong(changes, what, words):
    """On all ranks alike, so that nothing differs."""
    (finding,) = judged(0, 1, 2, 3, **changes)
    assert finding.what == what and words in finding.problem
    assert finding.values == {finding.problem: (0, 1, 2, 3)} and finding.fix


@pytest.mark.parametrize("value", ["eth", "en,ib", "^lo,docker", "=eth0"])
def test_interfaces_in_nccls_spelling(value):
    assert judged(0, 1, 2, 3, network__chosen={"NCCL_SOCKET_IFNAME": value}) == []


def test_a_cpu_build_beside_gpus():
    cpu = {"device__name": "cpu", "device__visible": None, "device__memory_bytes": None, "device__free_bytes": None}
    (finding,) = judged(0, 1, 2, 3, **cpu, versions__torch="2.13.0+cpu")
    assert finding.problem == "the host has 2 GPUs, torch 2.13.0+cpu sees none"
    assert judged(0, 1, 2, 3, **cpu, device__asked="cpu") == []


def test_clocks():
    world = [info(rank) for rank in range(4)]
    assert list(diagnose_clocks({2: Offset(0.9, 0.001)}, world)) == []
    assert list(diagnose_clocks({2: Offset(30.0, 29.5)}, world)) == [], "the answer took a minute"
    (finding,) = diagnose_clocks({2: Offset(-3.21, 0.001)}, world)
    assert finding.problem == "the clock of b is 3.2 s behind a's" and finding.values == {finding.problem: (2,)}


def test_folders():
    good = {"path": "/runs", "free_bytes": 10 * GIB, "write_bytes_per_second": 1e9, "shared": True, "problem": None}
    assert list(diagnose_folder("run_dir", [good, good | {"shared": None}])) == []
    (apart,) = diagnose_folder("run_dir", [good, good | {"shared": False}])
    assert apart.problem == "/runs is another folder than rank 0's" and apart.values == {apart.problem: (1,)}
    (full,) = diagnose_folder("run_dir", [good, good | {"free_bytes": 2**20}])
    assert full.problem == "/runs: 1.00 MiB free" and "make room" in full.fix
    (closed,) = diagnose_folder("run_dir", [good | {"problem": "/runs: Permission denied", "shared": None}, good])
    assert closed.what == "disk.run_dir" and closed.values == {"/runs: Permission denied": (0,)}
