"""`train.py --dry-run`: the plan of a run on standard output, as tables or as JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.apps.planner.device_file import load_device
from internlm_lite.apps.planner.fit import Room, fit
from internlm_lite.apps.planner.fit_report import fit_json, overrides, render_fit, write_overlay
from internlm_lite.apps.planner.plan import Questions, make_plan
from internlm_lite.apps.planner.render_plan import render
from internlm_lite.apps.planner.report import RunPlan
from internlm_lite.config.schema import Config
from internlm_lite.errors import ConfigError
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


@dataclass(frozen=True)
class FitOptions:
    """What `--fit` is asked."""

    gpus: int
    memory: int | None = None
    """Bytes of a GPU; None: of the device."""
    device: str = "auto"
    as_json: bool = False
    config: Path = Path()
    """The file that the layout is written above."""
    overrides: tuple[str, ...] = ()
    """Those of the command line, which `out` repeats."""
    out: Path | None = None


def dry_fit(config: Config, options: FitOptions) -> int:
    """Show the fastest layouts of a config that fit, and write the first one. Returns 0, or an error's exit code.

    `config` is that of `options.config` with `options.overrides`.
    """
    return run_tool(lambda: _show_fit(config, options))


def _show_fit(config: Config, options: FitOptions) -> int:
    device = load_device("h100" if options.device in ("auto", "cuda") else options.device)
    memory = options.memory or int((device.memory_gib or 0) * 2**30)
    if not memory:
        raise ConfigError(f"--fit: {device.name} does not say its memory; give --memory, such as 80GB")
    if config.engine.name != "native":
        raise ConfigError(f'--fit searches layouts of engine.name "native"; found "{config.engine.name}"; change it')
    if options.out is not None and (options.out.exists() or not options.out.parent.is_dir()):
        found = "it exists" if options.out.exists() else f"there is no folder {options.out.parent}"
        raise ConfigError(f"--fit-out {options.out}: {found}; expected a new file: choose another name")
    room = Room(options.gpus, memory, device)
    layouts = fit(config, room)
    if options.as_json:
        print(json.dumps(fit_json(layouts, room), indent=2))
    else:
        _console().print(render_fit(layouts, room))
        print(f"  {overrides(layouts[0])}")  # one line, whatever the width, as it is copied
    if options.out is not None:
        write_overlay(layouts[0], options.config, options.overrides, options.out)
    return 0


def _console() -> ToolConsole:
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    return ToolConsole(width=None if on_terminal else _WIDTH, highlight=False)


def _show(plan: RunPlan, options: PlanOptions) -> int:
    if options.as_json:
        print(json.dumps(plan.to_json(), indent=2))
    else:
        _console().print(render(plan, components=options.components or bool(options.lengths)))
    return 0
