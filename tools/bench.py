#!/usr/bin/env python3
"""Benchmarks, each a ratio in one run against what a user would otherwise pick. See docs/benchmarks/.

python tools/bench.py [--only step|ranks|loader] [--json] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from internlm_lite.bench.loader import bench_loader
from internlm_lite.bench.ranks import bench_ranks
from internlm_lite.bench.step import bench_step
from internlm_lite.runtime.device import device_name

CORPORA = ((100, 50_000_000), (800, 1_000_000_000))
"""(mean document length, tokens): the second writes 2 GB to the temporary folder."""
CPU_SHAPE = {"hidden": 384, "layers": 6, "heads": 6, "vocab": 8192, "seq_len": 512, "micro_bsz": 2, "micro_num": 2}
GPU_SHAPE = {"hidden": 2048, "layers": 16, "heads": 16, "vocab": 32768, "seq_len": 2048, "micro_bsz": 4, "micro_num": 2}


def run(only: str | None, rounds: int) -> dict[str, Any]:
    """All results as plain JSON values."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    shape = {**GPU_SHAPE, "dtype": "torch.bfloat16"} if on_gpu else {**CPU_SHAPE, "dtype": "torch.float32"}
    results: dict[str, Any] = {
        "machine": {
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
    }
    if only in (None, "loader"):
        with tempfile.TemporaryDirectory() as folder:
            results["loader"] = [
                asdict(bench_loader(Path(folder, str(length)), n_tokens, length)) for length, n_tokens in CORPORA
            ]
    if only in (None, "step"):
        results["step"] = asdict(bench_step(device, rounds, **shape))
    if only in (None, "ranks"):
        results["ranks"] = asdict(bench_ranks(2, rounds, **shape))
    return results


def show(results: dict[str, Any]) -> None:
    """The results as tables."""
    console = Console()
    for name, rows in results.items():
        table = Table("figure", "value", title=name, title_justify="left")
        for row in rows if isinstance(rows, list) else [rows]:
            for key, value in row.items():
                table.add_row(
                    key,
                    f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value,
                )
            table.add_section()
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["step", "ranks", "loader"], help="one benchmark instead of all")
    parser.add_argument("--rounds", type=int, default=9, help="alternating measurements per side (default 9)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    results = run(args.only, args.rounds)
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        show(results)


if __name__ == "__main__":
    main()
