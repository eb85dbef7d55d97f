"""`train.py --dry-run`: the plan of a run on standard output, as tables or as JSON."""

from __future__ import annotations

import json
import sys

from rich.console import Console

from internlm_lite.config.schema import Config
from internlm_lite.errors import InternLMError
from internlm_lite.planner.plan import make_plan
from internlm_lite.planner.view import render

_WIDTH = 110
"""Columns of the tables where standard output is no terminal."""


def dry_run(config: Config, world_size: int, *, tflops: float | None, device: str, as_json: bool) -> int:
    """Show the plan of a checked config; the exit code: 0, or that of the error the trainer would end with."""
    try:
        plan = make_plan(config, world_size, tflops, device)
    except InternLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False).print(render(plan))
    return 0
