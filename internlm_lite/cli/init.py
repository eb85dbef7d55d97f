"""Write example configs and launch scripts into a folder: configs/, launch/ and train.py.

    internlm-lite init my_project
    cd my_project && internlm-lite train --config configs/tiny.py

Files that are there already stay as they are.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.cli.options import new_parser
from internlm_lite.cli.starter import starter_folder
from internlm_lite.runtime.tool import run_tool

PATTERNS = ("configs/*.py", "launch/*.sh", "train.py")


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    source = starter_folder()
    for file in (file for pattern in PATTERNS for file in sorted(source.glob(pattern))):
        target = arguments.folder / file.relative_to(source)
        if target.exists():
            print(f"kept  {target}")
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
        if target.suffix == ".sh":
            target.chmod(0o755)  # a wheel does not keep the executable bit
        print(f"wrote {target}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 written, 6 storage, 130 interrupted."""
    parser = new_parser("init", __doc__)
    parser.add_argument("folder", type=Path, help="made if it is not there")
    return run_tool(partial(work, parser.parse_args(argv)))
