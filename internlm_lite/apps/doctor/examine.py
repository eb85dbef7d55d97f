"""One examination of all ranks of a job: what each runs on, clocks, folders, an all-reduce; rank 0 has the result.

every rank: RankInfo -> store -> rank 0 diagnoses, shows -> every rank: all-reduce -> rank 0 adds it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.doctor.bandwidth import AllReduceSpeed, all_reduce_speed
from internlm_lite.apps.doctor.clocks import Offset, clock_offsets
from internlm_lite.apps.doctor.diagnose import Finding, diagnose, diagnose_clocks, diagnose_folder, findings_of
from internlm_lite.apps.doctor.exchange import Exchange
from internlm_lite.apps.doctor.probe_folders import probe_folder
from internlm_lite.apps.doctor.rank_info import RankInfo, rank_info
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.rendezvous import rendezvous

OK, FAILED = 0, 2
"""Exit codes."""


@dataclass
class Examination:
    """The results of all ranks, on rank 0."""

    dist_env: DistEnv
    infos: list[RankInfo] = field(default_factory=list)
    offsets: dict[int, Offset] = field(default_factory=dict)
    folders: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    reduced: AllReduceSpeed | None = None
    """None for a world of one."""

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(info["host"] for info in self.infos))

    def to_json(self) -> dict[str, Any]:
        return {
            "launcher": self.dist_env.launcher,
            "why": self.dist_env.why,
            "hosts": self.hosts,
            "ranks": self.infos,
            "clock_offsets": {rank: vars(offset) for rank, offset in self.offsets.items()},
            "folders": self.folders,
            "all_reduce": None if self.reduced is None else vars(self.reduced),
            "findings": [finding.to_json() for finding in self.findings],
        }


def examine(
    dist_env: DistEnv,
    environ: Mapping[str, str],
    folders: Mapping[str, Path],
    device: str,
    timeout: timedelta,
    show: Callable[[Examination, bool], None],
) -> int:
    """Collective; returns the exit code, the same on every rank. `folders`: name -> folder the run will write to.

    `show(report, over)` is called on rank 0 before the all-reduce, which may end the process, and after it.
    Raises MeshError when ranks are missing, PeerLostError when one does not respond.
    """
    store = rendezvous(dist_env, timeout, fingerprint={})
    exchange = Exchange(store, dist_env, timeout)
    info, found = rank_info(dist_env, environ, device)
    report = Examination(dist_env, exchange.gather("info", info))
    first_ranks = exchange.broadcast("first", _first_ranks(report.infos))
    report.offsets = clock_offsets(exchange, first_ranks)
    report.findings += [*diagnose(report.infos), *diagnose_clocks(report.offsets, report.infos)]
    for name, folder in folders.items():
        probes = exchange.gather(f"probe/{name}", probe_folder(exchange, name, folder))
        report.folders[name] = probes
        report.findings += diagnose_folder(name, probes)
    if dist_env.is_main:
        show(report, False)
    able = exchange.broadcast("able", not any(info["device.problem"] for info in report.infos))
    if dist_env.world_size > 1 and able and found is not None:
        _reduce(report, exchange, found, timeout)
    if dist_env.is_main:
        show(report, True)
    return _agreed_code(report, exchange)


def _first_ranks(infos: list[RankInfo]) -> list[int]:
    """The first rank of every host except rank 0's host."""
    seen: dict[str, int] = {}
    for info in infos:
        seen.setdefault(info["host"], info["rank"])
    return [rank for rank in seen.values() if rank]


def _reduce(report: Examination, exchange: Exchange, device: torch.device, timeout: timedelta) -> None:
    # Ranks that fail early wait in the store for ranks that hang, so the time-out here is shorter.
    reduced = all_reduce_speed(exchange.dist_env, device, exchange.store, timeout / 3)
    problems = exchange.gather("reduced", reduced.problem)
    report.reduced = reduced
    fix = "check that the hosts reach each other on the interface used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); "
    fix += "NCCL_DEBUG=INFO says what NCCL tries"
    report.findings += findings_of("all-reduce", problems, fix)


def _agreed_code(report: Examination, exchange: Exchange) -> int:
    """Rank 0's exit code on all ranks. Collective; rank 0 returns last, as it may serve the store."""
    code: int = exchange.broadcast("code", FAILED if report.findings else OK)
    exchange.gather("bye", True)
    return code
