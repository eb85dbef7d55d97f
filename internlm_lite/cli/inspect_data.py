"""Show what the batches of a config look like, without building a model.

    internlm-lite inspect-data --config my_config.py --steps 5
    internlm-lite inspect-data --config my_config.py --show 200 data.seq_len=512
    internlm-lite inspect-data --config my_config.py --step 1200 --dp 8
    internlm-lite inspect-data --config my_config.py --find code:17

--step prints which documents are in a step, --find in which steps a document is, of the whole run: folder, index of the
document in the folder, its tokens, data-parallel rank, micro-batch and row. Give --dp as in the run.

--json prints one object a step: step, tokens (labels learnt over all data-parallel ranks), num_samples_in_batch,
largest_length, largest_batch, smallest_batch (of rank 0). Without it: tables for a terminal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from internlm_lite.cli.options import add_config, check_at_least, new_parser
from internlm_lite.config.load import check_config, load_config
from internlm_lite.config.schema import DataConfig
from internlm_lite.data.data_loader import TrainingData, open_training_data
from internlm_lite.data.demand import with_total_steps
from internlm_lite.data.render_batches import occurrences, overview, sample, walk_steps
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.data.trace import documents_of_step, steps_of_document
from internlm_lite.runtime.tool import ToolConsole, run_tool


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("inspect-data", __doc__)
    add = parser.add_argument
    add_config(parser)
    add("--dp", type=int, default=1, metavar="N", help="data-parallel ranks (1)")
    add("--steps", type=int, default=6, metavar="K", help="steps to walk through (6)")
    add("--json", action="store_true", help="one JSON object a step instead of tables")
    add("--show", type=int, default=0, metavar="PIECES", help="print the first pieces of the first row")
    add("--step", type=int, metavar="N", help="the documents of step N")
    add("--find", type=_document, metavar="FOLDER:DOC", help="the steps that document DOC of a data folder is in")
    arguments = parser.parse_intermixed_args(argv)
    check_at_least(parser, arguments, dp=1, steps=1, show=0)
    if arguments.step is not None and arguments.step < 0:
        parser.error(f"--step {arguments.step}: expected a number >= 0")
    return arguments


def _document(text: str) -> tuple[str, int]:
    """'code:17' -> ("code", 17). Raises ArgumentTypeError."""
    folder, _, number = text.rpartition(":")
    if not folder or not (number.isascii() and number.isdecimal()):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a data folder and a document's index: code:17")
    return folder, int(number)


def show_documents(arguments: argparse.Namespace, config: DataConfig, data: TrainingData) -> None:
    """Print the answers to --step and --find."""
    found = [] if arguments.step is None else documents_of_step(config, data, arguments.step)
    if arguments.find is not None:
        found += steps_of_document(config, data, *arguments.find)
    if arguments.json:
        for one in found:
            print(json.dumps(dataclasses.asdict(one)), flush=True)
        return
    if found or arguments.find is None:
        ToolConsole().print(occurrences(found))
    else:
        print("{}:{}: in none of the {:,} steps".format(*arguments.find, config.total_steps))


def work(arguments: argparse.Namespace) -> int:
    """Exit code."""
    loaded = load_config(arguments.config, arguments.overrides)
    check_config(loaded, None, ("data.", "stages"))
    config = loaded.config
    data = open_training_data(config.data, config.model.vocab_sizes, 0, arguments.dp, config.seed, config.stages)
    if arguments.step is not None or arguments.find is not None:
        show_documents(arguments, with_total_steps(config, data).data, data)
        return 0
    steps = walk_steps(data, arguments.steps)
    if arguments.json:
        for step in steps:
            print(json.dumps(dataclasses.asdict(step.figures)), flush=True)
        return 0
    walked = list(steps)
    console = ToolConsole()
    console.print(overview(data, walked))
    if arguments.show:
        tokenizer = None if config.data.tokenizer is None else Tokenizer(Path(config.data.tokenizer))
        console.print(sample(walked[0].batches[0], data.folders, tokenizer, arguments.show))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad config or data, 130 interrupted."""
    arguments = parse_arguments(argv)
    return run_tool(partial(work, arguments))
