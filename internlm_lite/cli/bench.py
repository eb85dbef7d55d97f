"""Benchmarks, each a ratio in one run against what a user would otherwise pick. See docs/benchmarks/.

internlm-lite bench [--only step|ranks|loader] [--json] [--rounds N]
internlm-lite bench --layouts [--json] [--rounds N]       data, tensor, pipeline parallel, ZeRO, and models on one GPU
internlm-lite bench --checkpoint [--json] [--rounds N]    280 MB saved and loaded: stall, writer, load, cost
internlm-lite bench --metrics [--json] [--rounds N]       a step line to every sink, beside a step without
internlm-lite bench --averages [--json] [--rounds N]      a step with an average of the weights, beside one without
internlm-lite bench --launches [--json]                   kernels of a GPU's step and bytes they move, counted on a CPU
internlm-lite bench --muon [--json] [--rounds N]          a step of Muon and one of AdamW, 17M and 100M parameters
internlm-lite bench --muon-demo FOLDER [--steps N]        both on the data of `internlm-lite demo` there, Muon in three
                                                          quarters of the steps: validation loss by learning rate
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.apps.bench.suites import (
    run_averages,
    run_basics,
    run_checkpoint,
    run_launches,
    run_layouts,
    run_metrics,
    run_muon,
    run_muon_demo,
    show,
)
from internlm_lite.apps.report.writer import open_report
from internlm_lite.cli.options import new_parser
from internlm_lite.cli.starter import starter_folder
from internlm_lite.runtime.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = new_parser("bench", __doc__)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=["step", "ranks", "loader"], help="one benchmark instead of all")
    which.add_argument("--layouts", action="store_true", help="the layouts instead")
    which.add_argument("--checkpoint", action="store_true", help="saving and loading instead")
    which.add_argument("--metrics", action="store_true", help="the cost of metrics and sinks instead")
    which.add_argument("--averages", action="store_true", help="the cost of an average of the weights instead")
    which.add_argument("--launches", action="store_true", help="launches on a GPU, counted without one, instead")
    which.add_argument("--muon", action="store_true", help="steps of Muon and AdamW instead")
    which.add_argument("--muon-demo", metavar="FOLDER", type=Path, help="whole runs of Muon and AdamW instead")
    add("--steps", type=int, default=200, help="AdamW's steps with --muon-demo (default 200)")
    add("--rounds", type=int, default=9, help="alternating measurements per side (default 9)")
    add("--json", action="store_true", help="print JSON instead of tables")
    return run_tool(partial(work, parser.parse_args(argv)))


def work(args: argparse.Namespace) -> int:
    """Exit code."""
    if args.layouts:
        results = run_layouts(args.rounds)
    elif args.checkpoint:
        results = run_checkpoint(args.rounds)
    elif args.metrics:
        results = run_metrics(args.rounds, {"the report": open_report})
    elif args.muon:
        results = run_muon(args.rounds)
    elif args.muon_demo is not None:
        results = run_muon_demo(starter_folder() / "configs" / "demo.py", args.muon_demo.resolve(), args.steps)
    elif args.averages:
        results = run_averages(args.rounds)
    elif args.launches:
        results = run_launches()
    else:
        results = run_basics(args.only, args.rounds)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    return 0
