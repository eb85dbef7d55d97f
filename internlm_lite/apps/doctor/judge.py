"""What differs between ranks, what is wrong on some, and how to mend it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from internlm_lite.apps.doctor.clocks import Offset
from internlm_lite.apps.doctor.facts import Facts
from internlm_lite.units import human_bytes

CLOCK_SECONDS = 1.0
FREE_BYTES = 2**30
SHARED_MEMORY_BYTES = 512 * 2**20
"""Of /dev/shm on a host with several GPUs; containers have 64 MiB unless told otherwise."""
LOCKED_BYTES = 2**36


@dataclass(frozen=True)
class Finding:
    """One thing to mend."""

    what: str
    """The fact's name, such as versions.torch."""
    problem: str
    """Empty: the ranks differ, see `values`."""
    values: Mapping[str, tuple[int, ...]]
    """Value as text -> ranks that have it."""
    mend: str


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
"""Facts that must be the same on every rank, with what to do if not; the first pattern that fits counts."""
_IN_BYTES = ("memory_bytes", "locked_memory")


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """Of facts in rank order."""
    return [*_differing(facts), *_wrong(facts)]


def _differing(facts: Sequence[Facts]) -> Iterator[Finding]:
    for name in sorted({name for own in facts for name in own}):
        mend = next((mend for pattern, mend in _EQUAL if fnmatch.fnmatchcase(name, pattern)), None)
        values = _by_value(facts, name)
        if mend is not None and len(values) > 1:
            yield Finding(name, "", values, mend)


def _by_value(facts: Sequence[Facts], name: str) -> dict[str, tuple[int, ...]]:
    values: dict[str, tuple[int, ...]] = {}
    for own in facts:
        text = _text(name, own.get(name))
        values[text] = (*values.get(text, ()), own["rank"])
    return values


def _text(name: str, value: Any) -> str:
    if value is None:
        return "no limit" if name.startswith("limits.") else "not there"
    if isinstance(value, dict):
        return ", ".join(f"{key} {state}" for key, state in value.items()) or "none"
    if name.endswith(_IN_BYTES):  # rounded: equal GPUs differ by a few megabytes
        return human_bytes(value) if value < 2**33 else f"{value / 2**30:.0f} GiB"
    return str(value)


def _wrong(facts: Sequence[Facts]) -> Iterator[Finding]:
    n_hosts = len({own["host"] for own in facts})
    checks: tuple[tuple[str, Callable[[Facts], str | None], str], ...] = (
        ("device", lambda own: own["device.problem"], "see the message and nvidia-smi; start one process for each GPU"),
        ("device", _hidden_gpu, "install a CUDA build of torch that fits the driver (nvidia-smi shows it)"),
        ("device.free", _occupied, "end the other processes on it (nvidia-smi)"),
        ("host.cores", _few_cores, "give more cores: srun --cpus-per-task=8"),
        ("network.chosen", _absent_interface, "name an interface that is up: ip -brief address shows them"),
        ("network.own_address", lambda own: _loopback(own, n_hosts), "give the host's name its real address in "
         "/etc/hosts, or export GLOO_SOCKET_IFNAME"),
        ("network.infiniband", _idle_port, "look at the cable and the subnet manager (ibstat)"),
        ("limits.open_files", lambda own: _few_files(own, len(facts)), "ulimit -n 65536 before the start; for Slurm "
         "LimitNOFILE in slurmd's unit"),
        ("limits.shared_memory", _little_shared, "give containers --ipc=host or --shm-size=8g"),
        ("limits.locked_memory", _little_locked, "ulimit -l unlimited; for Slurm LimitMEMLOCK=infinity in slurmd's "
         "unit, for containers --ulimit memlock=-1"),
    )  # fmt: skip
    for what, check, mend in checks:
        values: dict[str, tuple[int, ...]] = {}
        for own in facts:
            if problem := check(own):
                values[problem] = (*values.get(problem, ()), own["rank"])
        for problem, ranks in values.items():
            yield Finding(what, problem, {problem: ranks}, mend)


def _on_gpu(own: Facts) -> bool:
    return own.get("device.visible") is not None


def _hidden_gpu(own: Facts) -> str | None:
    if own["device.name"] != "cpu" or not own["host.gpus_there"] or own["device.asked"] == "cpu":
        return None
    return f"the host has {own['host.gpus_there']} GPUs, torch {own['versions.torch']} sees none"


def _occupied(own: Facts) -> str | None:
    if not _on_gpu(own) or own["device.free_bytes"] > 0.9 * own["device.memory_bytes"]:
        return None
    return f"only {human_bytes(own['device.free_bytes'])} of {human_bytes(own['device.memory_bytes'])} are free"


def _few_cores(own: Facts) -> str | None:
    cores = own["host.cores_of_rank"]
    return f"{cores} core for a rank with a GPU, expected 2 at least" if _on_gpu(own) and cores < 2 else None


def _absent_interface(own: Facts) -> str | None:
    """NCCL's syntax: prefixes with commas, `=` before exact names, `^` before what is left out; gloo takes names."""
    for name, value in own["network.chosen"].items():
        wanted = value.lstrip("=^").split(",")
        there = own["network.interfaces"]
        exact = value.startswith("=") or name.startswith("GLOO")
        fits = any(up == one if exact else up.startswith(one) for up in there for one in wanted)
        if not fits and not value.startswith("^"):
            return f"{name}={value}: no such interface is up; found {', '.join(sorted(there))}"
    return None


def _loopback(own: Facts, n_hosts: int) -> str | None:
    address = own["network.own_address"]
    if n_hosts < 2 or "GLOO_SOCKET_IFNAME" in own["network.chosen"] or not (address or "").startswith("127."):
        return None
    return f"the host's own name means {address} to it, which the other hosts cannot reach"


def _idle_port(own: Facts) -> str | None:
    ports: dict[str, str] = own["network.infiniband"]
    down = [port for port, state in ports.items() if not state.startswith("ACTIVE")]
    return f"InfiniBand ports {', '.join(down)} are down, others are up" if 0 < len(down) < len(ports) else None


def _few_files(own: Facts, world_size: int) -> str | None:
    files, wanted = own["limits.open_files"], 256 + 4 * world_size
    if files is None or files >= wanted:
        return None
    return f"{files} open files, expected {wanted} at least for {world_size} ranks"


def _little_shared(own: Facts) -> str | None:
    size = own["limits.shared_memory"]
    if not _on_gpu(own) or own["local_world_size"] < 2 or size is None or size >= SHARED_MEMORY_BYTES:
        return None
    return f"/dev/shm has {human_bytes(size)}, expected {human_bytes(SHARED_MEMORY_BYTES)} at least"


def _little_locked(own: Facts) -> str | None:
    locked = own["limits.locked_memory"]
    if not own["network.infiniband"] or locked is None or locked >= LOCKED_BYTES:
        return None
    return f"{human_bytes(locked)} of locked memory, too little for InfiniBand"


def judge_clocks(offsets: Mapping[int, Offset], facts: Sequence[Facts]) -> Iterator[Finding]:
    for rank, offset in offsets.items():
        if abs(offset.seconds) - offset.error > CLOCK_SECONDS:
            way = "ahead of" if offset.seconds > 0 else "behind"
            problem = f"the clock of {facts[rank]['host']} is {abs(offset.seconds):.1f} s {way} {facts[0]['host']}'s"
            yield Finding("clock", problem, {problem: (rank,)}, "keep the hosts' time with chrony or systemd-timesyncd")


def judge_folder(name: str, probes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """`probes`: what probe_folder found, in rank order."""
    what = f"disk.{name}"
    problems = dict.fromkeys(probe["problem"] for probe in probes if probe["problem"])
    for problem in problems:
        ranks = tuple(rank for rank, probe in enumerate(probes) if probe["problem"] == problem)
        mend = "choose another folder, or see to it that this user can write there and has room"
        yield Finding(what, problem, {problem: ranks}, mend)
    apart = tuple(rank for rank, probe in enumerate(probes) if probe["shared"] is False)
    if apart:
        problem = f"{probes[0]['path']} is another folder than rank 0's"
        yield Finding(what, problem, {problem: apart}, "choose a folder on a file system that all hosts share")
    full = tuple(
        rank for rank, one in enumerate(probes) if one["free_bytes"] is not None and one["free_bytes"] < FREE_BYTES
    )
    if full and not problems:  # what cannot be written, such as /proc, may well be without room too
        problem = f"{probes[full[0]]['path']}: {human_bytes(probes[full[0]]['free_bytes'])} free"
        yield Finding(what, problem, {problem: full}, "make room: python tools/ckpt.py prune, or choose another folder")
