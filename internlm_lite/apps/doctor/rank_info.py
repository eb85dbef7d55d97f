"""Environment and hardware of one rank, JSON-able values by dotted names. Never raises: unreadable values are None."""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from internlm_lite.errors import MeshError, first_line
from internlm_lite.runtime.device import bind_device, device_name
from internlm_lite.runtime.dist_env import DistEnv, chosen_interfaces, common_variables
from internlm_lite.runtime.folder import git_commit, package_versions

RankInfo = dict[str, Any]
_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")


def rank_info(dist_env: DistEnv, environ: Mapping[str, str], wanted: str) -> tuple[RankInfo, torch.device | None]:
    """(information, device of this rank or None if it cannot be used). `wanted`: auto, cpu, cuda."""
    device, about_it, problem = None, _device(None), None
    try:
        device = bind_device(dist_env, wanted)
        about_it = _device(device)
    except (MeshError, RuntimeError) as error:  # a full or broken GPU fails even on a query of its free memory
        device, problem = None, first_line(error)
    info = {"rank": dist_env.rank, "host": dist_env.hostname, "local_rank": dist_env.local_rank}
    info |= {"local_world_size": dist_env.local_world_size, "device.asked": wanted, "device.problem": problem}
    info |= _versions() | _host() | about_it | _network(environ) | _limits()
    info |= {f"environment.{name}": value for name, value in common_variables(environ).items()}
    return info, device


def _versions() -> RankInfo:
    git = git_commit(Path(__file__).parent)
    commit = None if git is None else git["commit"][:12] + (" with changes" if git["changed"] else "")
    nccl = torch.cuda.nccl.version() if torch.version.cuda and torch.distributed.is_nccl_available() else None
    return {
        "versions.python": platform.python_version(),
        "versions.python_path": sys.executable,
        "versions.internlm_lite": commit,
        "versions.internlm_lite_path": str(Path(__file__).parents[2]),
        "versions.cuda": torch.version.cuda,
        "versions.nccl": None if nccl is None else ".".join(map(str, nccl)),
        "versions.driver": _driver(),
        **{f"versions.{name}": version for name, version in package_versions().items()},
    }


def _driver() -> str | None:
    """Version of the NVIDIA kernel module."""
    try:
        match = re.search(r"\d+\.\d+(\.\d+)?", _DRIVER.read_text())
    except OSError:
        return None
    return match.group() if match else None


def _host() -> RankInfo:
    return {
        "host.cpu": device_name(torch.device("cpu")),
        "host.cores_of_rank": len(os.sched_getaffinity(0)),
        "host.memory_bytes": psutil.virtual_memory().total,
        "host.gpus_there": len(list(Path("/dev").glob("nvidia[0-9]*"))),
    }


def _device(device: torch.device | None) -> RankInfo:
    if device is None or device.type != "cuda":
        return {
            "device.name": None if device is None else "cpu",
            "device.memory_bytes": None,
            "device.free_bytes": None,
        }
    free, total = torch.cuda.mem_get_info(device)
    names = {"device.name": torch.cuda.get_device_name(device), "device.visible": torch.cuda.device_count()}
    return names | {"device.memory_bytes": total, "device.free_bytes": free}


def _network(environ: Mapping[str, str]) -> RankInfo:
    up = {name: state.speed for name, state in psutil.net_if_stats().items() if state.isup}
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
    ports = {}
    for port in sorted(_INFINIBAND.glob("*/ports/*")):
        try:
            state = (port / "state").read_text().partition(":")[2].strip()
            ports[f"{port.parts[-3]}/{port.name}"] = f"{state} {(port / 'rate').read_text().strip()}"
        except OSError:
            continue
    return {
        "network.interfaces": up,
        "network.own_address": address,
        "network.infiniband": ports,
        "network.chosen": chosen_interfaces(environ),
    }


def _limits() -> RankInfo:
    """Resource limits of this process; None: unlimited."""
    limits = {"open_files": resource.RLIMIT_NOFILE, "locked_memory": resource.RLIMIT_MEMLOCK}
    found = {name: resource.getrlimit(limit)[0] for name, limit in limits.items()}
    try:
        shared = shutil.disk_usage("/dev/shm").total
    except OSError:
        shared = None
    none = resource.RLIM_INFINITY
    return {f"limits.{name}": None if value == none else value for name, value in found.items()} | {
        "limits.shared_memory": shared
    }
