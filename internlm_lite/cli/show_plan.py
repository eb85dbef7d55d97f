"""Show what a training run will hold, send and cost, without starting it: the same as train --dry-run.

internlm-lite plan --config configs/20B_sft.py --world-size 16
internlm-lite plan --config configs/20B_sft.py --world-size 16 --device h100       how long a step takes, and why
internlm-lite plan --config configs/20B_sft.py --fit --gpus 32 --memory 80GB        which layouts fit, by speed
internlm-lite plan sizes --flops 1e21                                               which shape for so much compute
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from internlm_lite.cli import plan_sizes
from internlm_lite.cli.options import add_config, new_parser
from internlm_lite.cli.train import add_plan_options, check_plan_options, train_or_show
from internlm_lite.runtime.tool import run_tool


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 shown, else the exit code of the error that the run would raise."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["sizes"]:
        return plan_sizes.main(argv[1:])
    parser = new_parser("plan", __doc__)
    add_config(parser)
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks (default: as started)")
    add_plan_options(parser, "")
    parser.set_defaults(dry_run=True, print_config=None, seed=None, cfg_options=[], branch_from=None, decay_steps=None)
    parser.set_defaults(launcher="auto", host=None, port=None, rank=None, local_rank=None)
    arguments = parser.parse_intermixed_args(argv)
    check_plan_options(parser, arguments)
    return run_tool(lambda: train_or_show(arguments, {}))
