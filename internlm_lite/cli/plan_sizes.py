"""Shapes of models for given compute, with tokens, batch size and learning rate, by published rules.

internlm-lite plan sizes --flops 1e20 1e21                          for so many FLOPs
internlm-lite plan sizes --gpus 64 --days 3 --device h100           for so many days of so many GPUs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.sizes import SizeRow, sizes
from internlm_lite.cli.options import check_at_least, new_parser
from internlm_lite.runtime.tool import ToolConsole, run_tool
from internlm_lite.units import human_count, positive_number

_PIPE_COLUMNS = 170
"""Width of tables if standard output is no terminal."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("plan sizes", __doc__)
    add = parser.add_argument
    add("--flops", type=positive_number, nargs="+", metavar="C", help="FLOPs of the whole run, such as 1e21")
    add("--gpus", type=int, metavar="N", help="with --days and --device, instead of --flops")
    add("--days", type=positive_number, metavar="D")
    add("--device", default="h100", metavar="NAME", help="GPU, as of train.py --dry-run (h100)")
    add("--mfu", type=_fraction, default=0.4, metavar="F", help="fraction of its bf16 peak that a step reaches (0.4)")
    add("--vocab-size", type=int, default=50_304, metavar="V", help="rows of the embedding (50304)")
    add("--seq-len", type=int, default=4096, metavar="T", help="tokens of a row (4096)")
    add("--json", action="store_true", help="JSON instead of a table")
    arguments = parser.parse_args(argv)
    if (arguments.flops is None) == (arguments.gpus is None or arguments.days is None):
        parser.error("expected --flops, or --gpus with --days")
    check_at_least(parser, arguments, gpus=1, vocab_size=2, seq_len=1)
    return arguments


def _fraction(text: str) -> float:
    """'0.4' -> 0.4. Raises ArgumentTypeError."""
    number = positive_number(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a fraction up to 1, such as 0.4")
    return number


def work(arguments: argparse.Namespace) -> int:
    peak = load_device(arguments.device).peak_tflops["bf16"] * 1e12
    per_day = None if arguments.gpus is None else arguments.gpus * peak * arguments.mfu * 86_400
    budgets = arguments.flops or [per_day * arguments.days]
    rows = [row for compute in budgets for row in sizes(compute, arguments.vocab_size, arguments.seq_len)]
    if arguments.json:
        print(json.dumps([_as_json(row) for row in rows], indent=2))
        return 0
    console = ToolConsole(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_COLUMNS
    console.print(_table(rows))
    sources = {row.rule.name: row.rule.source for row in rows}
    console.print(*(f"  {name}: {source}" for name, source in sources.items()), sep="\n", style="dim", soft_wrap=True)
    console.print(
        "  loss: of the fit of arXiv:2404.10102, to compare rows; each rule holds for its authors' data and recipe",
        style="dim",
        soft_wrap=True,
    )
    return 0


def _table(rows: Sequence[SizeRow]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    names = ("FLOPs", "rule", "parameters", "layers", "hidden", "heads/kv", "mlp", "tokens", "per parameter",
             "batch tokens", "steps", "lr", "schedule", "loss")  # fmt: skip
    for name in names:
        table.add_column(name, justify="left" if name in ("rule", "schedule") else "right", no_wrap=True)
    for row in rows:
        shape = row.shape
        cells = (f"{row.compute:.3g}", row.rule.name, human_count(shape.parameters), f"{shape.num_layers}",
                 f"{shape.hidden_size}", f"{shape.num_attention_heads}/{shape.num_kv_attention_heads}",
                 f"{shape.mlp_hidden_size}", human_count(row.tokens),
                 f"{row.tokens / shape.parameters:.1f}", human_count(row.batch_tokens), f"{row.steps:,}",
                 f"{row.lr:.2e}", row.rule.schedule, f"{row.loss:.3f}")  # fmt: skip
        table.add_row(*cells)
    return table


def _as_json(row: SizeRow) -> dict[str, Any]:
    return {
        "flops": row.compute,
        "rule": row.rule.name,
        "source": row.rule.source,
        "parameters": row.shape.parameters,
        "non_embedding_parameters": row.shape.non_embedding,
        "model": asdict(row.shape),
        "tokens": row.tokens,
        "batch_tokens": row.batch_tokens,
        "steps": row.steps,
        "lr": row.lr,
        "schedule": row.rule.schedule,
        "loss": row.loss,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 shown, else that of the error."""
    return run_tool(lambda: work(parse_arguments(argv)))
