"""Look at what all ranks of a job run on: shows what differs or is wrong, and how to mend it.

    python tools/doctor.py                                                               this process alone
    torchrun --nproc_per_node=8 tools/doctor.py                                          all ranks of one machine
    srun -N 2 -n 16 --ntasks-per-node=8 --gpus-per-task=1 python tools/doctor.py --config configs/20B_sft.py

Start it exactly as train.py is to be started. Exit code 0: nothing to mend, 2: something.
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

from internlm_lite.apps.doctor.examine import Report, examine
from internlm_lite.apps.doctor.view import findings_text, last_line
from internlm_lite.config.load import load_config
from internlm_lite.config.paths import is_s3
from internlm_lite.runtime.place import adopt_s3_keys, find_place
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import wait_seconds


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, help="config file: look at its checkpoint folders too")
    parser.add_argument("--run-dir", type=Path, default=Path("RUN"), help="as for train.py")
    parser.add_argument(
        "--launcher", choices=["auto", "slurm", "torch", "single"], default="auto", help="who started us"
    )
    parser.add_argument("--host", help="where rank 0 listens (default: from the launcher)")
    parser.add_argument("--port", type=int, help="its port (default: from the launcher)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument(
        "--timeout", type=wait_seconds, default=120, metavar="SECONDS", help="longest wait for other ranks (120)"
    )
    parser.add_argument("--json", action="store_true", help="everything that was found, as one JSON document")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.overrides and arguments.config is None:
        parser.error(f"{arguments.overrides[0]!r} changes a config: give --config too")
    return arguments


def folders_of(arguments: argparse.Namespace) -> dict[str, Path]:
    """Name -> where the run writes. What is on S3 is left out. Raises ConfigError."""
    folders = {"run_dir": arguments.run_dir}
    if arguments.config is not None:
        ckpt = load_config(arguments.config, arguments.overrides).config.ckpt
        written = {"save_ckpt_folder": ckpt.save_ckpt_folder, "snapshot_ckpt_folder": ckpt.snapshot_ckpt_folder}
        for name, folder in written.items():
            if ckpt.enable_save_ckpt and folder is not None and not is_s3(folder):
                folders[name] = Path(folder.removeprefix("local:"))
    return folders


class Shown:
    """Shows each finding as soon as it is known, and a last line; or everything at the end, as JSON."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._n_shown = as_json, 0

    def __call__(self, report: Report, over: bool) -> None:
        new, self._n_shown = report.findings[self._n_shown :], len(report.findings)
        if new and not self._as_json:
            print(findings_text(report, new), flush=True)
        if over:
            print(json.dumps(report.to_json(), indent=2) if self._as_json else last_line(report), flush=True)


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    adopt_s3_keys(os.environ)
    place = find_place(os.environ, arguments.launcher, arguments.host, arguments.port)
    timeout = timedelta(seconds=arguments.timeout)
    return examine(place, os.environ, folders_of(arguments), arguments.device, timeout, Shown(arguments.json))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 nothing to mend, 2 something, or the ranks did not meet, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments))


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that hangs in a collective may hold up every other way out
