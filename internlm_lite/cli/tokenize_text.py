"""Train a tokenizer, and turn folders of text into tokenised data folders.

    internlm-lite tokenizer train  --input corpus/code corpus/docs --output tokenizer.model --vocab-size 8000
    internlm-lite tokenizer encode --input corpus/code corpus/docs --output data/train --tokenizer tokenizer.model

Text: .jsonl ({"text"} or {"prompt", "response"}), .parquet, .txt, .md and source files, at any depth.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from internlm_lite.cli.options import check_at_least, new_parser
from internlm_lite.data.documents import Metadata
from internlm_lite.data.encode import encode_folder
from internlm_lite.data.text import find_text, sample_text
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import human_bytes, human_count

HEARTBEAT_SECONDS = 15.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("tokenizer", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train a sentencepiece model on text")
    encode = commands.add_parser("encode", help="tokenise folders of text")
    for command in (train, encode):
        command.add_argument("--input", type=Path, nargs="+", required=True, help="folders of text")
        command.add_argument("--text-key", default="text", help="key or column that holds the text (text)")
        command.add_argument(
            "--workers", type=int, default=os.cpu_count() or 1, help="processes, or threads of train (all cores)"
        )
    train.add_argument("--output", type=Path, required=True, help="the .model file to write")
    train.add_argument("--vocab-size", type=int, required=True, help="pieces; 260 are the bytes and special tokens")
    train.add_argument(
        "--max-bytes", type=int, default=20_000_000, help="text to train on, spread over the folders (20000000)"
    )
    encode.add_argument(
        "--output", type=Path, required=True, help="folder to write one data folder per input folder to"
    )
    encode.add_argument("--tokenizer", type=Path, required=True, help="sentencepiece model")
    encode.add_argument("--overwrite", action="store_true", help="replace data folders that exist")
    arguments = parser.parse_args(argv)
    check_at_least(parser, arguments, workers=1, max_bytes=1, vocab_size=261)
    return arguments


def train(arguments: argparse.Namespace) -> int:
    """Train and save a tokenizer. Exit code."""
    texts = sample_text(arguments.input, arguments.text_key, arguments.max_bytes)
    tokenizer = train_tokenizer(texts, arguments.output, arguments.vocab_size, arguments.workers)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Tokenise each input folder and print what became of it. Exit code."""
    targets = {arguments.output / source.resolve().name: source for source in arguments.input}
    if len(targets) < len(arguments.input):
        raise DataError("--input: two folders of the same name would become one data folder; rename one of them")
    tokenizer = Tokenizer(arguments.tokenizer)
    console = Console()
    found: dict[str, Metadata] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("MB"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        for target, source in targets.items():
            total = sum(file.n_bytes for file in find_text(source, arguments.text_key))
            found[target.name] = encode_folder(
                tokenizer.path,
                source,
                target,
                workers=arguments.workers,
                text_key=arguments.text_key,
                overwrite=arguments.overwrite,
                progress=_reporter(target.name, total, bars, console),
            )
    console.print(_statistics(found))
    return 0


def _reporter(name: str, total_bytes: int, bars: Progress, console: Console) -> Callable[[int], None]:
    """Moves a bar on a terminal; off a terminal prints a line now and then."""
    task = bars.add_task(name, total=round(total_bytes / 1e6, 1))
    done, last = 0, time.monotonic()

    def report(n_bytes: int) -> None:
        nonlocal done, last
        done += n_bytes
        bars.update(task, completed=round(done / 1e6, 1))
        if not console.is_terminal and time.monotonic() - last >= HEARTBEAT_SECONDS:
            last = time.monotonic()
            print(f"{name}: {human_bytes(done)} of about {human_bytes(total_bytes)}", flush=True)

    return report


def _statistics(found: dict[str, Metadata]) -> Table:
    table = Table("folder", "documents", "tokens", "text", "bytes/token", "longest (tokens)", title="tokenised data")
    for name, data in found.items():
        table.add_row(
            name,
            human_count(data.documents),
            human_count(data.tokens),
            human_bytes(data.text_bytes),
            f"{data.text_bytes / data.tokens:.2f}",
            str(data.longest),
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 bad input, 6 storage, 130 interrupted."""
    arguments = parse_arguments(argv)
    if arguments.command == "train":
        return run_tool(partial(train, arguments))
    return run_tool(
        partial(encode, arguments), "interrupted: folders already tokenised are whole, the one under way was removed"
    )
