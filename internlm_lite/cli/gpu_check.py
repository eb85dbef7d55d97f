"""The first minutes on a GPU: is it right, does it hang, how fast is it. `make gpu` runs it with the machine's Python.

internlm-lite gpu-check [--budget SECONDS] [--only NAME,...] [--out FOLDER]
internlm-lite gpu-check --smoke                                             every section on the CPU, with tiny shapes
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.apps.bench.gpu.run_sections import PLAN, Runner
from internlm_lite.cli.options import new_parser
from internlm_lite.runtime.tool import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("gpu-check", __doc__)
    add = parser.add_argument
    add("--budget", type=float, default=470, metavar="SECONDS", help="for all sections together (470)")
    add("--only", default="", metavar="NAME,...", help="sections whose name begins so")
    add("--out", type=Path, default=Path("gpu_check_out"), help="for gpu_check.json and gpu_check.txt")
    add("--smoke", action="store_true", help="on the CPU, to see that every section runs")
    arguments = parser.parse_args(argv)
    arguments.wanted = [p for p in PLAN if any(p.name.startswith(name) for name in arguments.only.split(","))]
    if not arguments.wanted:
        parser.error(f"--only {arguments.only}: expected beginnings of {', '.join(part.name for part in PLAN)}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    return run_tool(partial(work, parse_arguments(argv)))


def work(arguments: argparse.Namespace) -> int:
    """Exit code: 0 every section that ran is right, 1 otherwise."""
    repository = Path(__file__).resolve().parents[2]
    runner = Runner(repository, arguments.out.resolve(), arguments.budget, arguments.smoke)
    runner.run(arguments.wanted)
    print(runner.summary())
    return 0 if runner.good else 1
