"""Check what all ranks of a job run on: what differs or is wrong, and how to fix it.

    internlm-lite doctor                                                                 this process alone
    torchrun --nproc_per_node=8 tools/doctor.py                                          all ranks of one machine
    srun -N 2 -n 16 --ntasks-per-node=8 --gpus-per-task=1 python tools/doctor.py --config configs/20B_sft.py

Start it exactly as train.py is to be started. Exit code 0: nothing to fix, 2: something.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

from internlm_lite.apps.doctor.examine import Examination, examine
from internlm_lite.apps.doctor.render_findings import findings_text, last_line
from internlm_lite.cli.options import add_config, add_device, add_launcher, new_parser
from internlm_lite.config.load import load_config
from internlm_lite.config.paths import is_s3
from internlm_lite.runtime.dist_env import adopt_s3_keys, check_options, read_dist_env
from internlm_lite.runtime.tool import run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("doctor", __doc__)
    add = parser.add_argument
    add_config(parser, required=False, text="config file: look at its checkpoint folders too")
    add_launcher(parser, timeout=120)
    add_device(parser)
    add("--run-dir", type=Path, default=Path("RUN"), help="as for train.py")
    add("--json", action="store_true", help="everything that was found, as one JSON document")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.overrides and arguments.config is None:
        parser.error(f"{arguments.overrides[0]!r} changes a config: give --config too")
    return arguments


def folders_of(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name -> local folder that the run writes to; folders on S3 are left out. Raises ConfigError."""
    folders = {"run_dir": arguments.run_dir}
    if arguments.config is not None:
        ckpt = load_config(arguments.config, arguments.overrides).config.ckpt
        written = {"save_ckpt_folder": ckpt.save_ckpt_folder, "snapshot_ckpt_folder": ckpt.snapshot_ckpt_folder}
        for name, folder in written.items():
            if ckpt.enable_save_ckpt and folder is not None and not is_s3(folder):
                folders[name] = Path(folder.removeprefix("local:"))
    return folders


class Shown:
    """Prints new findings at once, and a last line; or everything at the end, as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._n_shown = as_json, 0

    def __call__(self, report: Examination, over: bool) -> None:
        new, self._n_shown = report.findings[self._n_shown :], len(report.findings)
        if new and not self._as_json:
            print(findings_text(report, new), flush=True)
        if over:
            print(json.dumps(report.to_json(), indent=2) if self._as_json else last_line(report), flush=True)


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    adopt_s3_keys(os.environ)
    dist_env = read_dist_env(os.environ, arguments.launcher, arguments.host, arguments.port)
    check_options(dist_env, rank=arguments.rank, local_rank=arguments.local_rank, world_size=arguments.world_size)
    timeout = timedelta(seconds=arguments.timeout)
    return examine(dist_env, os.environ, folders_of(arguments), arguments.device, timeout, Shown(arguments.json))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 nothing to fix, 2 something, or the ranks did not meet, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments))


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """`main`, then os._exit: a thread that hangs in a collective would block a normal interpreter exit."""
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)
