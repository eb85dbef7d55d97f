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
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.text import find_text, sample_text
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.errors import DataError
from internlm_lite.runtime.tool import run_tool
from internlm_lite.units import human_bytes, human_count

HEARTBEAT_SECONDS = 15.0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("tokenizer", __doc__)
    commands, cores = parser.add_subparsers(dest="command", required=True), os.cpu_count() or 1
    train = commands.add_parser("train", help="train a sentencepiece model on text")
    encode = commands.add_parser("encode", help="tokenise folders of text")
    for command in (train, encode):
        add = command.add_argument
        add("--input", type=Path, nargs="+", required=True, help="folders of text")
        add("--text-key", default="text", help="key or column that holds the text (text)")
        add("--workers", type=int, default=cores, help="processes, or threads of train (all cores)")
    add = train.add_argument
    add("--output", type=Path, required=True, help="the .model file to write")
    add("--vocab-size", type=int, required=True, help="pieces; 260 are the bytes and special tokens")
    add("--max-bytes", type=int, default=20_000_000, help="text to train on, spread over the folders (20000000)")
    add = encode.add_argument
    add("--output", type=Path, required=True, help="folder to write one data folder per input folder to")
    add("--tokenizer", type=Path, required=True, help="sentencepiece model")
    add("--overwrite", action="store_true", help="replace data folders that exist")
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
    """Tokenise each input folder and print statistics. Exit code."""
    targets = {arguments.output / source.resolve().name: source for source in arguments.input}
    if len(targets) < len(arguments.input):
        raise DataError("--input: two folders of the same name would become one data folder; rename one of them")
    tokenizer = Tokenizer(arguments.tokenizer)
    console = Console()
    found: dict[str, Metadata] = {}
    name, unit = TextColumn("{task.description}"), TextColumn("MB")
    columns = (name, BarColumn(), MofNCompleteColumn(), unit, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        for target, source in targets.items():
            total = sum(file.n_bytes for file in find_text(source, arguments.text_key))
            progress = _reporter(target.name, total, bars, console)
            encoder = FolderEncoder(tokenizer.path, arguments.workers, arguments.text_key, progress)
            found[target.name] = encoder.encode(source, target, overwrite=arguments.overwrite)
    console.print(_statistics(found))
    return 0


def _reporter(name: str, total_bytes: int, bars: Progress, console: Console) -> Callable[[int], None]:
    """A progress callback: advances a bar on a terminal, else prints a line every HEARTBEAT_SECONDS."""
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
