"""Benchmarks, each a ratio in one run against what a user would otherwise pick. See docs/benchmarks/.

internlm-lite bench [--only step|ranks|loader] [--json] [--rounds N]
internlm-lite bench --layouts [--json] [--rounds N]       data, tensor, pipeline parallel, ZeRO, and models on one GPU
internlm-lite bench --zero [--json] [--rounds N]          stages of ZeRO on 4 ranks, beside fully_shard and DeepSpeed
internlm-lite bench --context [--json] [--rounds N]       tokens of a row on two ranks, beside rows on two ranks
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
    run_context,
    run_launches,
    run_layouts,
    run_metrics,
    run_muon,
    run_muon_demo,
    run_zero,
    show,
)
from internlm_lite.apps.report.writer import open_report
from internlm_lite.cli.options import new_parser
from internlm_lite.cli.starter import starter_folder
from internlm_lite.runtime.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = new_parser("bench", __doc__)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", choices=["step", "ranks", "loader"], help="one benchmark instead of all")
    suite = partial(which.add_argument, action="store_const", dest="suite")
    suite("--layouts", const=run_layouts, help="the layouts instead")
    suite("--zero", const=run_zero, help="the stages of ZeRO instead")
    suite("--context", const=run_context, help="context parallelism beside data parallelism instead")
    suite("--checkpoint", const=run_checkpoint, help="saving and loading instead")
    suite(
        "--metrics",
        const=partial(run_metrics, sinks={"the report": open_report}),
        help="the cost of metrics and sinks instead",
    )
    suite("--averages", const=run_averages, help="the cost of an average of the weights instead")
    suite(
        "--launches",
        const=lambda rounds: run_launches(),
        help="launches on a GPU, counted without one, instead",
    )
    suite("--muon", const=run_muon, help="steps of Muon and AdamW instead")
    which.add_argument("--muon-demo", metavar="FOLDER", type=Path, help="whole runs of Muon and AdamW instead")
    parser.add_argument("--steps", type=int, default=200, help="AdamW's steps with --muon-demo (default 200)")
    parser.add_argument("--rounds", type=int, default=9, help="alternating measurements per side (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return run_tool(partial(work, parser.parse_args(argv)))


def work(args: argparse.Namespace) -> int:
    """Exit code."""
    if args.suite:
        results = args.suite(args.rounds)
    elif args.muon_demo is not None:
        results = run_muon_demo(starter_folder() / "configs" / "demo.py", args.muon_demo.resolve(), args.steps)
    else:
        results = run_basics(args.only, args.rounds)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
    return 0
