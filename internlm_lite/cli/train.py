"""Train a decoder from a config file, as one process, under torchrun, or under Slurm.

    python train.py --config configs/demo.py
    torchrun --nproc_per_node=8 train.py --config configs/7B_sft.py
    srun -N 2 -n 16 --ntasks-per-node=8 --gpus-per-task=1 python train.py --config configs/20B_sft.py

    python train.py --config configs/20B_sft.py --dry-run --world-size 16    shows what it will hold, send and cost
    python train.py --config configs/20B_sft.py --dry-run --world-size 16 --device h100    and how long a step takes
    python train.py --config configs/20B_sft.py --dry-run --fit --gpus 32 --memory 80GB    which layouts fit, by speed

Trailing NAME=value replaces a variable before the config runs, section.key=value sets one key after it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from internlm_lite import __version__
from internlm_lite.cli.options import DEVICES, add_config, add_launcher, check_at_least, new_parser
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import memory_bytes

if TYPE_CHECKING:
    from internlm_lite.config.load import LoadedConfig
    from internlm_lite.config.schema import Config
    from internlm_lite.monitor.sinks import SinkFactory


_MOST_RANKS = 100_000
"""Of a plan, which takes half a minute then; a thousand times as many would fill the memory."""


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = new_parser("train", __doc__)
    add = parser.add_argument
    add("--version", action="version", version=f"internlm-lite {__version__}")
    add_config(parser)
    add_launcher(parser, timeout=600, world_size_help="likewise; with --dry-run: ranks to plan for")
    add("--backend", choices=["nccl", "gloo"], help="accepted for old command lines; follows the device")
    add("--resume", metavar="auto|none|STEP|PATH", help="checkpoint to resume from (default: auto)")
    add("--branch-from", metavar="CKPT", help="let the learning rate decay from a checkpoint of the stable phase")
    add("--decay-steps", type=int, metavar="N", help="with --branch-from: steps of the decay")
    add("--eval-only", action="store_true", help="evaluate the checkpoint to resume from, and stop")
    add("--seed", type=int, help="seed of weights and data order, instead of the config's")
    add("--run-dir", type=Path, default=Path("RUN"), help="logs and metrics go to RUN_DIR/<JOB_NAME>/<time>")
    add("--profiling", action="store_true", help="write a trace of three early steps per rank")
    add("--log-style", choices=["auto", "full", "compact"], default="auto", help="lines on the terminal")
    text = "print the config, or lr, momenta and batch size over the run, and stop"
    add("--print-config", choices=["full", "diff", "origin", "schedule"], help=text)
    add("--dry-run", action="store_true", help="show what the run will hold, send and cost, and stop")
    add_plan_options(parser, "with --dry-run: ")
    add("--cfg-options", nargs="*", default=[], metavar="KEY=VALUE", help="same as the trailing ones")
    arguments = parser.parse_intermixed_args(argv)
    plan_only = ("tflops", "json", "components", "lengths", "memory")
    if not arguments.dry_run and (given := [name for name in plan_only if getattr(arguments, name)]):
        parser.error(f"--{given[0]} belongs to --dry-run: add it")
    if not arguments.dry_run and arguments.device not in DEVICES:
        named = "the name or file of a GPU belongs to --dry-run"
        parser.error(f"--device {arguments.device}: expected {', '.join(DEVICES)}; {named}")
    check_plan_options(parser, arguments)
    _check_branch(parser, arguments)
    return arguments


def _check_fit(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for name, needs in (("fit", "dry_run"), ("gpus", "fit"), ("fit_out", "fit")):
        if getattr(arguments, name) and not getattr(arguments, needs):
            parser.error(f"--{name} belongs to --{needs}: add it".replace("_", "-"))
    if not arguments.fit:
        return
    if arguments.gpus is None:
        parser.error("--fit needs the number of GPUs: add --gpus N")
    check_at_least(parser, arguments, gpus=1)
    for name in ("world_size", "tflops", "components", "lengths"):
        if getattr(arguments, name):
            parser.error(f"--{name} does not go with --fit: leave it out".replace("_", "-"))
    if arguments.device == "cpu":
        parser.error("--fit searches layouts of GPUs: --device cpu is not one; name h100, another, or a JSON file")


def _check_branch(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if (arguments.branch_from is None) != (arguments.decay_steps is None):
        parser.error("--branch-from and --decay-steps belong together: give both")
    check_at_least(parser, arguments, decay_steps=1)
    if arguments.branch_from and (arguments.eval_only or arguments.resume not in (None, "auto", "none")):
        other = "--eval-only" if arguments.eval_only else f"--resume {arguments.resume}"
        parser.error(f"--branch-from and {other} name two checkpoints to begin from: leave one of them out")


def add_plan_options(parser: argparse.ArgumentParser, when: str) -> None:
    """Add the options of the plan. `when`: text put before each help text."""
    parser.add_argument("--tflops", type=float, metavar="X", help=f"{when}TFLOP/s of one GPU, for the times")
    text = (
        "auto, cpu or cuda (auto: a GPU if there is one); "
        + when
        + "also h100, h200, a100, b200 or a JSON file: a GPU "
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help=text + "on which to predict the step")
    parser.add_argument("--json", action="store_true", help=f"{when}JSON instead of tables")
    text = "parameters, memory and FLOPs of every component of the model"
    parser.add_argument("--components", action="store_true", help=f"{when}{text}")
    text = "as --components, with FLOPs over documents of these lengths, too, such as 1024,16384"
    parser.add_argument("--lengths", type=_lengths, default=(), metavar="N,N", help=f"{when}{text}")
    text = "the largest data.micro_bsz that fits this memory of a GPU, such as 80GB or 79.6GiB"
    parser.add_argument("--memory", type=memory_bytes, metavar="SIZE", help=f"{when}{text}")
    text = "search the fastest layouts that fit --gpus of --memory"
    parser.add_argument("--fit", action="store_true", help=f"{when}{text}")
    parser.add_argument("--gpus", type=int, metavar="N", help="with --fit: number of GPUs")
    text = "with --fit: write the first layout as a config above --config"
    parser.add_argument("--fit-out", type=Path, metavar="FILE", help=text)


def _lengths(text: str) -> tuple[int, ...]:
    """'1024,16384' -> (1024, 16384). Raises ArgumentTypeError."""
    parts = text.replace("_", "").split(",")
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) < 2**31 for part in parts):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected tokens, such as 1024,16384")
    return tuple(map(int, parts))


def check_plan_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for option, ranks in (("--world-size", arguments.world_size), ("--gpus", arguments.gpus)):
        if ranks is not None and ranks > _MOST_RANKS:
            parser.error(f"{option} {ranks}: expected at most {_MOST_RANKS}, as a plan lists every rank")
    for name, value in (("--world-size", arguments.world_size), ("--tflops", arguments.tflops)):
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"{name} {value}: expected a number > 0")
    _check_fit(parser, arguments)


def main(argv: Sequence[str] | None = None, sinks: Mapping[str, SinkFactory] | None = None) -> int:
    """Returns the exit code of --print-config, --dry-run and an invalid config; training ends the process itself.

    `sinks`: additional sinks by name (`monitor.record.Sink`).
    """
    return run_tool(lambda: train_or_show(parse_arguments(argv), sinks or {}), "interrupted before the start")


def train_or_show(arguments: argparse.Namespace, sinks: Mapping[str, SinkFactory]) -> int:
    """Exit code, if no training was started."""
    # Imported late: --help is quick, and a wrong config is reported before torch is loaded.
    from internlm_lite.config.load import check_config, load_config
    from internlm_lite.errors import ConfigError, InternLMError
    from internlm_lite.runtime.dist_env import adopt_s3_keys, check_options, error_file, read_dist_env, set_defaults
    from internlm_lite.runtime.torchrun import write_agent_error

    overrides = [*arguments.cfg_options, *arguments.overrides]
    if arguments.seed is not None:
        overrides.append(f"seed={arguments.seed}")
    quiet, who = False, ""
    set_defaults(os.environ)
    try:
        adopt_s3_keys(os.environ)
        dist_env = read_dist_env(os.environ, arguments.launcher, arguments.host, arguments.port)
        world_size = None if arguments.dry_run else arguments.world_size
        check_options(dist_env, rank=arguments.rank, local_rank=arguments.local_rank, world_size=world_size)
        quiet, who = dist_env.local_rank > 0, f"rank {dist_env.rank} on {dist_env.hostname}: " if dist_env.rank else ""
        loaded = load_config(arguments.config, overrides)
        if arguments.branch_from:
            loaded = _branch(arguments, loaded, overrides)
        world_size = arguments.world_size or dist_env.world_size
        check_config(loaded, None if arguments.print_config or arguments.fit else world_size)
    except InternLMError as error:
        if not (quiet and isinstance(error, ConfigError)):  # the config is invalid on all ranks: one rank reports it
            print(f"{who}{type(error).__name__}: {error}", file=sys.stderr)
        write_agent_error(error_file(os.environ), f"{type(error).__name__}: {error}")
        return error.exit_code
    if dist_env.rank > 0 and (arguments.print_config or arguments.dry_run):  # all ranks would print the same
        return 0
    if arguments.print_config or arguments.dry_run:
        print(*loaded.notes, sep="\n", end="\n" if loaded.notes else "", file=sys.stderr)
    if arguments.print_config:
        return _print_config(loaded, arguments.print_config, world_size)
    if arguments.dry_run:
        return _dry_run(arguments, loaded.config, world_size, overrides)

    from internlm_lite.apps.report.writer import open_report
    from internlm_lite.runtime.device import usable_gpus
    from internlm_lite.runtime.dist_env import overlap_notes, set_gpu_defaults
    from internlm_lite.train.job import Options, run_job

    if usable_gpus(arguments.device):
        set_gpu_defaults(os.environ, deterministic=loaded.config.deterministic)
        notes = overlap_notes(os.environ, loaded.config.parallel.zero_stage)
        loaded = replace(loaded, notes=(*loaded.notes, *notes))
    options = Options(
        resume=arguments.resume,
        device=arguments.device,
        run_dir=arguments.run_dir,
        timeout_seconds=arguments.timeout,
        log_style=arguments.log_style,
        command=tuple(sys.argv),
        profiling=arguments.profiling,
        sinks={"the report": open_report, **sinks},
        eval_only=arguments.eval_only,
    )
    run_job(loaded, dist_env, options)


def _branch(arguments: argparse.Namespace, loaded: LoadedConfig, overrides: Sequence[str]) -> LoadedConfig:
    """The config of the branch of --branch-from."""
    from internlm_lite.config.load import load_config
    from internlm_lite.train.branch import branch_overrides

    more = branch_overrides(loaded.config, arguments.branch_from, arguments.decay_steps)
    branch = load_config(arguments.config, [*overrides, *more])
    saved = branch.config.ckpt.save_ckpt_folder
    note = f"--branch-from {arguments.branch_from}: the rate falls in {arguments.decay_steps} steps; saved to {saved}"
    return replace(branch, notes=(*branch.notes, note))


def _print_config(loaded: LoadedConfig, how: str, world_size: int) -> int:
    """`how`: "schedule", or one of those of `render_config.print_config`."""
    if how != "schedule":
        from internlm_lite.config.render_config import print_config

        print(print_config(loaded, how))
        return 0
    from rich.console import Console

    from internlm_lite.apps.planner.render_schedule import render_schedule

    Console(highlight=False).print(render_schedule(loaded.config, world_size))
    return 0


def _dry_run(arguments: argparse.Namespace, config: Config, world_size: int, overrides: Sequence[str]) -> int:
    from internlm_lite.apps.planner.command import FitOptions, PlanOptions, dry_fit, dry_run

    if arguments.fit:
        options = FitOptions(
            gpus=arguments.gpus,
            memory=arguments.memory,
            device=arguments.device,
            as_json=arguments.json,
            config=arguments.config,
            overrides=tuple(overrides),
            out=arguments.fit_out,
        )
        return dry_fit(config, options)
    asked = PlanOptions(
        tflops=arguments.tflops,
        device=arguments.device,
        as_json=arguments.json,
        components=arguments.components,
        lengths=arguments.lengths,
        memory=arguments.memory,
    )
    return dry_run(config, world_size, asked)
