"""`train.py --dry-run`: the plan of a run on standard output, as tables or as JSON."""

from __future__ import annotations

import json
import sys

from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.plan import make_plan
from internlm_lite.apps.planner.render_plan import render
from internlm_lite.apps.planner.report import RunPlan
from internlm_lite.config.schema import Config
from internlm_lite.runtime.tool import ToolConsole, run_tool

_WIDTH = 110
"""Width of the tables if standard output is no terminal."""


def dry_run(config: Config, world_size: int, *, tflops: float | None, device: str, as_json: bool) -> int:
    """Show the plan of a checked config. Returns 0, or the exit code of the error that the trainer would raise.

    `device`: "cpu", "cuda" or "auto"; or a name or file of `load_device`, on which the step is timed."""

    def plan() -> RunPlan:
        timed = None if device in ("auto", "cpu", "cuda") else load_device(device)
        return make_plan(config, world_size, tflops, "cpu" if device == "cpu" else "cuda", timed)

    return run_tool(lambda: _show(plan(), as_json))


def _show(plan: RunPlan, as_json: bool) -> int:
    if as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        ToolConsole(width=None if on_terminal else _WIDTH, highlight=False).print(render(plan))
    return 0
