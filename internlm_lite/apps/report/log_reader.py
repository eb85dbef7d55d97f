"""Reads a run from a log of InternLM or ours. Only step lines are used."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import ConfigError, DataError
from internlm_lite.monitor.jsonl import step_object
from internlm_lite.monitor.line import parse_step_line

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_BEGIN = re.compile(r"\d{4}-\d{2}-\d{2}T\S+ INFO \[")
"""Start of a step line; launchers may put a rank before it."""


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
    why, n_skipped, segment, last = "", 0, 0, -1
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                text = _COLOUR.sub("", text)
                begin = _BEGIN.search(text)
                try:
                    record = parse_step_line(text[begin.start() :] if begin else text)
                except DataError as error:
                    why = why or (str(error) if begin else "")
                    n_skipped += 1
                    continue
                if record.step == last:
                    continue
                segment += record.step < last
                last = record.step
                lines.append(json.dumps(step_object(record, segment)).encode())
    except OSError as error:
        raise ConfigError(f"cannot read {printable(path)}: {error.strerror}; expected a log with step lines") from error
    if not lines:
        raise ConfigError(
            f"found no step line in the {n_skipped} lines of {printable(path)}; expected InternLM's, "
            f"'TIME INFO [FILE, line N, in FUNCTION] - pid=N : tflops=... step=0 loss=...'{why and f' ({why})'}"
        )
    run.columns.append(lines)
    run.parsed = True
    return LogRun(run, n_skipped)
