"""report.html of any run, finished or still running, of several overlaid, or of a log of InternLM or InternEvo.

internlm-lite report RUN/demo/latest                   report.html in the run folder, loss.png with matplotlib
internlm-lite report RUN/a/latest RUN/b/latest         report.html and loss.png here, or -o ab.html: and ab.png
internlm-lite report --from-log train.log              train.html beside it
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from internlm_lite.apps.report.discover import omitted_runs, require_runs, run_name
from internlm_lite.apps.report.figure import AXES, can_draw, write_figure
from internlm_lite.apps.report.log_reader import read_log
from internlm_lite.apps.report.page import write_report
from internlm_lite.apps.report.payload import UNREADABLE, make_payload
from internlm_lite.apps.report.run import RunReader
from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.cli.options import new_parser
from internlm_lite.errors import ConfigError
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import escaped


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("report", __doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders, job folders, or RUN itself")
    add("--from-log", action="append", default=[], type=Path, metavar="FILE", help="a log's step lines")
    add("-o", "--output", type=Path, metavar="FILE", help="default: in the run folder, beside the log")
    add("--over", choices=list(AXES), default="step", help="what loss.png is drawn over (step)")
    add("--png", action="store_true", help="insist on loss.png (else: when matplotlib is installed)")
    arguments = parser.parse_args(argv)
    if not arguments.runs and not arguments.from_log:
        parser.error("expected a RUN or --from-log FILE")
    return arguments


def read_runs(arguments: argparse.Namespace) -> list[RunReader]:
    """Readers of the requested runs. Raises ConfigError for a path without runs."""
    folders = require_runs(arguments.runs)
    for line in omitted_runs(arguments.runs):
        print(line)
    runs = [RunReader(folder, run_name(folder)).read_all() for folder in folders]
    for path in arguments.from_log:
        log = read_log(path)
        print(f"{printable(path)}: {log.run.columns.n} steps; {log.n_skipped} other lines skipped")
        runs.append(log.run)
    return runs


def places(arguments: argparse.Namespace, runs: Sequence[RunReader]) -> tuple[Path, Path]:
    """(path of the page, path of the figure)"""
    if arguments.output is None and len(runs) > 1:
        return Path("report.html"), Path("loss.png")
    if arguments.output is None and arguments.from_log:
        arguments.output = arguments.from_log[0].with_suffix(".html")
    if arguments.output is None:
        return runs[0].folder / "report.html", runs[0].folder / "loss.png"
    return arguments.output, arguments.output.with_suffix(".png")


def check(payload: Mapping[str, Any]) -> None:
    """Print which runs cannot be shown. Raises ConfigError when none can."""
    broken = [run for run in payload["runs"] if run["state"]["phase"] == UNREADABLE]
    for run in broken:
        print(escaped(f"{run['folder']} cannot be shown: {run['state']['why']}"), file=sys.stderr)
    if len(broken) == len(payload["runs"]):
        raise ConfigError("nothing to show; repair or remove the file that is damaged")


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    runs = read_runs(arguments)
    payload = make_payload([(f"r{at}", run) for at, run in enumerate(runs)], live=False)
    check(payload)
    page, figure = places(arguments, runs)
    write_report(payload, page)
    print(f"wrote {printable(page)}")
    if arguments.png or can_draw():
        write_figure(payload, figure, arguments.over)
        print(f"wrote {printable(figure)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input or a missing package, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments))
