"""`train.py --dry-run`: the plan of a run on standard output, as tables or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.apps.planner.render_plan import render
from internlm_lite.apps.planner.report import RunPlan
from internlm_lite.config.schema import Config
from internlm_lite.runtime.tool import ToolConsole, run_tool

_WIDTH = 110
"""Width of the tables if standard output is no terminal."""


@dataclass(frozen=True)
class PlanOptions:
    """What is shown, and how."""

    tflops: float | None = None
    device: str = "auto"
    """"cpu", "cuda" or "auto"; or a name or file of `load_device`, on which the step is timed."""
    as_json: bool = False
    components: bool = False
    """Show parameters, memory and FLOPs of every component."""
    lengths: tuple[int, ...] = ()
    """See `Questions`, as the next one."""
    memory: int | None = None


def dry_run(config: Config, world_size: int, options: PlanOptions) -> int:
    """Show the plan of a checked config. Returns 0, or the exit code of the error that the trainer would raise."""

    def plan() -> RunPlan:
        timed = None if options.device in ("auto", "cpu", "cuda") else load_device(options.device)
        device = "cpu" if options.device == "cpu" else "cuda"
        questions = Questions(timed, options.lengths, options.memory)
        return make_plan(config, world_size, options.tflops, device, questions)

    return run_tool(lambda: _show(plan(), options))


def _show(plan: RunPlan, options: PlanOptions) -> int:
    if options.as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        on_terminal = sys.stdout is not None and sys.stdout.isatty()
        rendered = render(plan, components=options.components or bool(options.lengths))
        ToolConsole(width=None if on_terminal else _WIDTH, highlight=False).print(rendered)
    return 0
