"""One examination of all ranks of a job: facts, clocks, folders, an all-reduce; the verdict is rank 0's.

every rank: facts -> store -> rank 0 judges, shows -> every rank: all-reduce -> rank 0 adds it
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.doctor.bandwidth import Reduced, all_reduce_speed
from internlm_lite.apps.doctor.clocks import Offset, clock_offsets
from internlm_lite.apps.doctor.disk import probe_folder
from internlm_lite.apps.doctor.exchange import Exchange
from internlm_lite.apps.doctor.facts import Facts, facts_of
from internlm_lite.apps.doctor.judge import Finding, judge, judge_clocks, judge_folder
from internlm_lite.runtime.meet import meet
from internlm_lite.runtime.place import Place

FINE, SICK = 0, 2
"""Exit codes."""


@dataclass
class Report:
    """Of all ranks, on rank 0."""

    place: Place
    facts: list[Facts] = field(default_factory=list)
    offsets: dict[int, Offset] = field(default_factory=dict)
    folders: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    reduced: Reduced | None = None
    """None for a world of one."""

    @property
    def hosts(self) -> list[str]:
        return list(dict.fromkeys(own["host"] for own in self.facts))

    def to_json(self) -> dict[str, Any]:
        return {
            "launcher": self.place.launcher,
            "why": self.place.why,
            "hosts": self.hosts,
            "ranks": self.facts,
            "clock_offsets": {rank: vars(offset) for rank, offset in self.offsets.items()},
            "folders": self.folders,
            "all_reduce": None if self.reduced is None else vars(self.reduced),
            "findings": [vars(finding) for finding in self.findings],
        }


def examine(
    place: Place,
    environ: Mapping[str, str],
    folders: Mapping[str, Path],
    device: str,
    timeout: timedelta,
    show: Callable[[Report, bool], None],
) -> int:
    """Collective; the exit code, the same on every rank. `folders`: name -> where the run will write.

    `show(report, over)` is called on rank 0 before the all-reduce, in which a broken network may end the process, and
    after it.
    Raises MeshError when ranks are missing, PeerLostError when one does not answer.
    """
    store = meet(place, timeout, says={})
    exchange = Exchange(store, place, timeout)
    facts, found = facts_of(place, environ, device)
    report = Report(place, exchange.gather("facts", facts))
    first_ranks = exchange.from_main("first", _first_ranks(report.facts))
    report.offsets = clock_offsets(exchange, first_ranks)
    report.findings += [*judge(report.facts), *judge_clocks(report.offsets, report.facts)]
    for name, folder in folders.items():
        probes = exchange.gather(f"probe/{name}", probe_folder(exchange, name, folder))
        report.folders[name] = probes
        report.findings += judge_folder(name, probes)
    if place.is_main:
        show(report, False)
    able = exchange.from_main("able", not any(own["device.problem"] for own in report.facts))
    if place.world_size > 1 and able and found is not None:
        _reduce(report, exchange, found, timeout)
    if place.is_main:
        show(report, True)
    return _agreed_code(report, exchange)


def _first_ranks(facts: list[Facts]) -> list[int]:
    """The first rank of every host but rank 0's."""
    seen: dict[str, int] = {}
    for own in facts:
        seen.setdefault(own["host"], own["rank"])
    return [rank for rank in seen.values() if rank]


def _reduce(report: Report, exchange: Exchange, device: torch.device, timeout: timedelta) -> None:
    # Ranks that fail at once wait in the store for those that hang, so these give up sooner.
    reduced = all_reduce_speed(exchange.place, device, exchange.store, timeout / 3)
    problems: dict[str, tuple[int, ...]] = {}
    for rank, problem in enumerate(exchange.gather("reduced", reduced.problem)):
        if problem:
            problems[problem] = (*problems.get(problem, ()), rank)
    report.reduced = reduced
    mend = "check that the hosts reach each other on the interface used (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); "
    mend += "NCCL_DEBUG=INFO says what NCCL tries"
    report.findings += [Finding("all-reduce", problem, {problem: ranks}, mend) for problem, ranks in problems.items()]


def _agreed_code(report: Report, exchange: Exchange) -> int:
    """Rank 0, which may serve the store, leaves last."""
    code: int = exchange.from_main("code", SICK if report.findings else FINE)
    exchange.gather("bye", True)
    return code
