"""Reads a run from a log of InternLM, InternEvo or ours. Only step lines are used."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import ConfigError
from internlm_lite.monitor.jsonl import finite
from internlm_lite.monitor.line import parse_step_line

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class LogRun:
    run: RunReader
    n_skipped: int
    """Lines that are not step lines."""


def read_log(path: Path) -> LogRun:
    """The run in a log. A step number that decreases is a restart; a step printed by two ranks counts once.

    Raises ConfigError for a file that cannot be read or holds no step line.
    """
    run = RunReader(path.parent, printable(path.name))
    run.is_log = True
    lines: list[bytes] = []
    n_skipped, segment, last = 0, 0, -1
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                figures = parse_step_line(_COLOUR.sub("", text))
                if figures is None:
                    n_skipped += 1
                elif figures["step"] != last:
                    segment += figures["step"] < last
                    last = figures["step"]
                    lines.append(json.dumps(finite({"seg": segment, **figures})).encode())
    except OSError as error:
        raise ConfigError(f"cannot read {printable(path)}: {error.strerror}; expected a log with step lines") from error
    if not lines:
        raise ConfigError(
            f"found no step line in the {n_skipped} lines of {printable(path)}; expected lines with step and loss, "
            "as InternLM and InternEvo print them: '... step=0 loss=11.5 ...'"
        )
    run.columns.append(lines)
    run.parsed = True
    return LogRun(run, n_skipped)
