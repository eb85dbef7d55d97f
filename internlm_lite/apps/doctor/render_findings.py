"""The findings as text: what differs between ranks or is wrong, and how to fix it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from internlm_lite.apps.doctor.bandwidth import AllReduceSpeed
from internlm_lite.apps.doctor.diagnose import Finding
from internlm_lite.apps.doctor.examine import Examination
from internlm_lite.units import human_bytes

_WIDEST = 40
"""Values are padded up to this width."""


def findings_text(report: Examination, findings: Sequence[Finding]) -> str:
    """One paragraph per finding."""
    return "\n".join(line for finding in findings for line in _lines(report, finding))


def _lines(report: Examination, finding: Finding) -> Iterator[str]:
    if finding.problem:
        ranks = next(iter(finding.values.values()))
        yield f"WRONG    {finding.what}: {finding.problem}   [{_where(report, ranks)}]"
    else:
        yield f"DIFFERS  {finding.what}"
        width = min(_WIDEST, max(map(len, finding.values)))
        for value, ranks in finding.values.items():
            yield f"           {value:<{width}}   [{_where(report, ranks)}]"
    yield f"           -> {finding.fix}"


def _where(report: Examination, ranks: Sequence[int]) -> str:
    """ranks 0-3 6 on node1 node2"""
    hosts = list(dict.fromkeys(report.infos[rank]["host"] for rank in ranks))
    named = " ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if hosts[4:] else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {spans(ranks)} on {named}"


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2 5'; ascending numbers."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def last_line(report: Examination) -> str:
    """4 ranks on 2 hosts: nothing differs, nothing is wrong; all-reduce of 16.00 MiB: 1.20 GB/s."""
    n_ranks, n_hosts = len(report.infos), len(report.hosts)
    who = f"{n_ranks} rank{'s' if n_ranks > 1 else ''} on {n_hosts} host{'s' if n_hosts > 1 else ''}"
    n = len(report.findings)
    verdict = f"{n} thing{'s' if n > 1 else ''} to fix" if n else "nothing differs, nothing is wrong"
    return f"{who} ({report.dist_env.why}): {verdict}{_speed(report.reduced)}"


def _speed(reduced: AllReduceSpeed | None) -> str:
    if reduced is None or reduced.bytes_per_second is None:
        return ""
    size = human_bytes(reduced.n_bytes)
    return f"; all-reduce of {size} over {reduced.backend}: {reduced.bytes_per_second / 1e9:.2f} GB/s"
