"""What differs between ranks, what is wrong on some, and how to fix it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm_lite.apps.doctor.clocks import Offset
from internlm_lite.apps.doctor.rank_info import RankInfo
from internlm_lite.units import human_bytes

CLOCK_SECONDS = 1.0
FREE_BYTES = 2**30
SHARED_MEMORY_BYTES = 512 * 2**20
"""Least size of /dev/shm on a host with several GPUs; containers have 64 MiB by default."""
LOCKED_BYTES = 2**36


@dataclass(frozen=True)
class Finding:
    """One thing to fix."""

    what: str
    """Dotted name of the value, such as versions.torch."""
    problem: str
    """Description; empty if ranks differ, see `values`."""
    values: Mapping[str, tuple[int, ...]]
    """Value as text -> ranks with that value."""
    fix: str

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "problem": self.problem, "values": self.values, "mend": self.fix}


_EQUAL = (
    ("versions.python_path", "start every rank with the same environment, on a file system that all hosts share"),
    ("versions.internlm_lite*", "start every rank from the same checkout, on a file system that all hosts share"),
    ("versions.driver", "install the same NVIDIA driver on all hosts"),
    ("versions.*", "install the same versions everywhere: make venv, in one folder that all hosts share"),
    ("host.cpu", "ask for one kind of node (sbatch --constraint): the slowest sets the pace"),
    ("host.gpus_there", "ask for one kind of node, and look at nvidia-smi where GPUs are missing"),
    ("host.cores_of_rank", "give every rank the same number of cores (--cpus-per-task)"),
    ("device.name", "ask for one kind of GPU (sbatch --constraint): the slowest sets the pace"),
    ("device.memory_bytes", "ask for one kind of GPU; look for partitioned ones (nvidia-smi -L)"),
    ("network.infiniband", "look at the ports of the hosts that stand out (ibstat)"),
    ("limits.open_files", "set the same limits on all hosts (/etc/security/limits.d, LimitNOFILE of slurmd)"),
    ("limits.locked_memory", "set the same limits on all hosts (LimitMEMLOCK of slurmd)"),
    ("environment.*", "export it before srun or torchrun, the same on all hosts"),
)
"""(pattern of names that must be equal on all ranks, how to fix a difference); the first match counts."""
_IN_BYTES = ("memory_bytes", "locked_memory")


def diagnose(infos: Sequence[RankInfo]) -> list[Finding]:
    """All findings. `infos`: of all ranks, in rank order."""
    return [*_differing(infos), *_wrong(infos)]


def _differing(infos: Sequence[RankInfo]) -> Iterator[Finding]:
    for name in sorted({name for info in infos for name in info}):
        fix = next((fix for pattern, fix in _EQUAL if fnmatch.fnmatchcase(name, pattern)), None)
        values = ranks_by(_text(name, info.get(name)) for info in infos)
        if fix is not None and len(values) > 1:
            yield Finding(name, "", values, fix)


def ranks_by(texts: Iterable[str | None]) -> dict[str, tuple[int, ...]]:
    """Text -> ranks that have it. `texts`: one per rank, in rank order; None is ignored."""
    found: dict[str, tuple[int, ...]] = {}
    for rank, text in enumerate(texts):
        if text is not None:
            found[text] = (*found.get(text, ()), rank)
    return found


def findings_of(what: str, problems: Iterable[str | None], fix: str) -> Iterator[Finding]:
    """One finding for each distinct problem. `problems`: one per rank, in rank order; None: no problem."""
    return (Finding(what, problem, {problem: ranks}, fix) for problem, ranks in ranks_by(problems).items() if problem)


def _text(name: str, value: Any) -> str:
    if value is None:
        return "no limit" if name.startswith("limits.") else "not there"
    if isinstance(value, dict):
        return ", ".join(f"{key} {state}" for key, state in value.items()) or "none"
    if name.endswith(_IN_BYTES):  # rounded: memory of equal GPUs differs by a few megabytes
        return human_bytes(value) if value < 2**33 else f"{value / 2**30:.0f} GiB"
    return str(value)


def _wrong(infos: Sequence[RankInfo]) -> Iterator[Finding]:
    n_hosts = len({info["host"] for info in infos})
    checks: tuple[tuple[str, Callable[[RankInfo], str | None], str], ...] = (
        ("device", lambda own: own["device.problem"], "see the message and nvidia-smi; start one process for each GPU"),
        ("device", _hidden_gpu, "install a CUDA build of torch that fits the driver (nvidia-smi shows it)"),
        ("device.free", _occupied, "end the other processes on it (nvidia-smi)"),
        ("host.cores", _few_cores, "give more cores: srun --cpus-per-task=8"),
        ("network.chosen", _absent_interface, "name an interface that is up: ip -brief address shows them"),
        ("network.own_address", lambda info: _loopback(info, n_hosts), "give the host's name its real address in "
         "/etc/hosts, or export GLOO_SOCKET_IFNAME"),
        ("network.infiniband", _idle_port, "look at the cable and the subnet manager (ibstat)"),
        ("limits.open_files", lambda info: _few_files(info, len(infos)), "ulimit -n 65536 before the start; for Slurm "
         "LimitNOFILE in slurmd's unit"),
        ("limits.shared_memory", _little_shared, "give containers --ipc=host or --shm-size=8g"),
        ("limits.locked_memory", _little_locked, "ulimit -l unlimited; for Slurm LimitMEMLOCK=infinity in slurmd's "
         "unit, for containers --ulimit memlock=-1"),
    )  # fmt: skip
    for what, check, fix in checks:
        yield from findings_of(what, map(check, infos), fix)


def _on_gpu(info: RankInfo) -> bool:
    return info.get("device.visible") is not None


def _hidden_gpu(info: RankInfo) -> str | None:
    if info["device.name"] != "cpu" or not info["host.gpus_there"] or info["device.asked"] == "cpu":
        return None
    return f"the host has {info['host.gpus_there']} GPUs, torch {info['versions.torch']} sees none"


def _occupied(info: RankInfo) -> str | None:
    if not _on_gpu(info) or info["device.free_bytes"] > 0.9 * info["device.memory_bytes"]:
        return None
    return f"only {human_bytes(info['device.free_bytes'])} of {human_bytes(info['device.memory_bytes'])} are free"


def _few_cores(info: RankInfo) -> str | None:
    cores = info["host.cores_of_rank"]
    return f"{cores} core for a rank with a GPU, expected at least 2" if _on_gpu(info) and cores < 2 else None


def _absent_interface(info: RankInfo) -> str | None:
    """Problem of a chosen interface that does not exist. NCCL: comma-separated prefixes, `=` exact, `^` excluded."""
    for name, value in info["network.chosen"].items():
        wanted = value.lstrip("=^").split(",")
        there = info["network.interfaces"]
        exact = value.startswith("=") or name.startswith("GLOO")
        fits = any(up == one if exact else up.startswith(one) for up in there for one in wanted)
        if not fits and not value.startswith("^"):
            return f"{name}={value}: no such interface is up; found {', '.join(sorted(there))}"
    return None


def _loopback(info: RankInfo, n_hosts: int) -> str | None:
    address = info["network.own_address"]
    if n_hosts < 2 or "GLOO_SOCKET_IFNAME" in info["network.chosen"] or not (address or "").startswith("127."):
        return None
    return f"the host's own name means {address} to it, which the other hosts cannot reach"


def _idle_port(info: RankInfo) -> str | None:
    ports: dict[str, str] = info["network.infiniband"]
    down = [port for port, state in ports.items() if not state.startswith("ACTIVE")]
    return f"InfiniBand ports {', '.join(down)} are down, others are up" if 0 < len(down) < len(ports) else None


def _few_files(info: RankInfo, world_size: int) -> str | None:
    files, wanted = info["limits.open_files"], 256 + 4 * world_size
    if files is None or files >= wanted:
        return None
    return f"{files} open files, expected at least {wanted} for {world_size} ranks"


def _little_shared(info: RankInfo) -> str | None:
    size = info["limits.shared_memory"]
    if not _on_gpu(info) or info["local_world_size"] < 2 or size is None or size >= SHARED_MEMORY_BYTES:
        return None
    return f"/dev/shm has {human_bytes(size)}, expected at least {human_bytes(SHARED_MEMORY_BYTES)}"


def _little_locked(info: RankInfo) -> str | None:
    locked = info["limits.locked_memory"]
    if not info["network.infiniband"] or locked is None or locked >= LOCKED_BYTES:
        return None
    return f"{human_bytes(locked)} of locked memory, too little for InfiniBand"


def diagnose_clocks(offsets: Mapping[int, Offset], infos: Sequence[RankInfo]) -> Iterator[Finding]:
    for rank, offset in offsets.items():
        if abs(offset.seconds) - offset.error > CLOCK_SECONDS:
            way = "ahead of" if offset.seconds > 0 else "behind"
            problem = f"the clock of {infos[rank]['host']} is {abs(offset.seconds):.1f} s {way} {infos[0]['host']}'s"
            yield Finding("clock", problem, {problem: (rank,)}, "keep the hosts' time with chrony or systemd-timesyncd")


def diagnose_folder(name: str, probes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Findings about a folder. `probes`: results of probe_folder, in rank order."""
    what = f"disk.{name}"
    fix = "choose another folder, or make sure that this user can write there and has room"
    yield from findings_of(what, (probe["problem"] for probe in probes), fix)
    apart = (probes[0]["path"] if probe["shared"] is False else None for probe in probes)
    problems = (f"{path} is another folder than rank 0's" if path else None for path in apart)
    yield from findings_of(what, problems, "choose a folder on a file system that all hosts share")
    free = [probe["free_bytes"] for probe in probes]
    full = tuple(rank for rank, n_bytes in enumerate(free) if n_bytes is not None and n_bytes < FREE_BYTES)
    if full and not any(probe["problem"] for probe in probes):  # /proc has no free space either
        problem = f"{probes[full[0]]['path']}: {human_bytes(free[full[0]])} free"
        yield Finding(what, problem, {problem: full}, "make room: python tools/ckpt.py prune, or choose another folder")
