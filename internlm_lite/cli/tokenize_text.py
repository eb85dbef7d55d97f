"""Train a tokenizer, and turn folders of text into tokenised data folders.

    internlm-lite tokenizer train  --input corpus/code corpus/docs --output tokenizer.model --vocab-size 8000
    internlm-lite tokenizer encode --input corpus/code corpus/docs --output data/train --tokenizer tokenizer.model

Pairs for an encoder-decoder are files NAME.de and NAME.en, line by line, or records with both keys. A vocabulary of
whole words, or a sentencepiece model, of each side or of both, from the text to train on alone:

    internlm-lite tokenizer train  --input corpus/train/help --side de --words --min-freq 2 --output de.json
    internlm-lite tokenizer train  --input corpus/train/help --side en --words --min-freq 2 --output en.json
    internlm-lite tokenizer encode --input corpus/train/help --output data/train --pair de en \\
        --source-tokenizer de.json --tokenizer en.json

Text, at any depth: .jsonl, .json, .csv, .tsv and .parquet ({"text"} or {"prompt", "response"}), .txt, .md and source
files, each also as .gz, .bz2, .xz or .zst. What is left out or read in doubt is counted at the end.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from internlm_lite.cli.options import check_at_least, new_parser
from internlm_lite.data.documents import Metadata
from internlm_lite.data.encode import FolderEncoder
from internlm_lite.data.text import TextOptions, TextProgress, sample_text
from internlm_lite.data.text_files import BadLimit, Tally
from internlm_lite.data.tokenizer import Tokenizer, train_tokenizer
from internlm_lite.data.word_vocabulary import default_rules, train_words
from internlm_lite.errors import DataError
from internlm_lite.runtime.tool import ToolConsole, run_tool
from internlm_lite.units import human_bytes, human_count

HEARTBEAT_SECONDS = 15.0
MAX_BYTES = 20_000_000
"""Text that a sentencepiece model is trained on, unless told otherwise."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("tokenizer", __doc__)
    commands, cores = parser.add_subparsers(dest="command", required=True), os.cpu_count() or 1
    train = commands.add_parser("train", help="train a sentencepiece model on text, or collect its words")
    encode = commands.add_parser("encode", help="tokenise folders of text")
    for command in (train, encode):
        add = command.add_argument
        add("--input", type=Path, nargs="+", required=True, help="folders of text")
        add("--text-key", default="text", help="key or column that holds the text (text)")
        add("--prompt-key", default="prompt", help="key or column of a prompt (prompt)")
        add("--response-key", default="response", help="key or column of the response to it (response)")
        add("--plain-text", nargs="+", default=[], metavar=".SUFFIX", help="files to take as one document each")
        add("--encoding", type=_encoding, help="of files without a byte order mark (UTF-8, else Latin-1)")
        text = "records without text, or damaged, that may be left out: a number, or a share (1%%)"
        add("--max-bad-records", type=_limit, default="1%", metavar="N|P%", help=text)
        add("--workers", type=int, default=cores, help="processes, or threads of train (all cores)")
    add = train.add_argument
    add("--output", type=Path, required=True, help="the file to write")
    add("--vocab-size", type=int, help="pieces; 260 are the bytes and special tokens. Of --words: the most, if given")
    text = f"text to train on, spread over the folders ({MAX_BYTES}; all of it with --words)"
    add("--max-bytes", type=int, help=text)
    add("--side", nargs="+", default=[], metavar="KEY", help="of pairs: the suffix or key of one side, or of both")
    add("--words", action="store_true", help="a vocabulary of whole words instead of a sentencepiece model")
    add("--min-freq", type=int, default=1, help="--words: how often a word must occur (1)")
    add("--rules", help='--words: "plain" or "spacy:LANGUAGE" (spaCy for the side where it is installed, else plain)')
    add = encode.add_argument
    add("--output", type=Path, required=True, help="folder to write one data folder per input folder to")
    add("--tokenizer", type=Path, required=True, help="tokenizer.model, tokenizer.json, ... or a folder")
    add(
        "--pair",
        nargs=2,
        default=[],
        metavar=("SOURCE", "TARGET"),
        help="suffixes or keys of the sides of pairs: de en",
    )
    add("--source-tokenizer", type=Path, help="of the sources of pairs (--tokenizer)")
    add("--overwrite", action="store_true", help="replace data folders that exist")
    text = "share of the documents for validation, written beside --output: .../train and .../valid, or DATA_valid"
    held_out = encode.add_mutually_exclusive_group()
    held_out.add_argument("--holdout", type=_share, default=0.0, metavar="P%", help=text)
    text = "cut every text after this share of its characters: the rest is for validation, written as with --holdout"
    held_out.add_argument("--split-at", type=_share, metavar="P%", help=text)
    text = "documents are their text alone: with a text in one file, rows of a batch are its windows, end to end"
    add("--without-bos-eos", action="store_true", help=text)
    arguments = parser.parse_args(argv)
    if arguments.command == "encode":
        check_at_least(parser, arguments, workers=1)
        if arguments.pair and arguments.pair[0] == arguments.pair[1]:
            parser.error(
                f"--pair: found {arguments.pair[0]!r} twice, expected the sides of the source and of the target"
            )
        if arguments.pair and (arguments.without_bos_eos or arguments.split_at is not None):
            parser.error("--pair: found with --without-bos-eos or --split-at, expected neither: pairs are whole")
        return arguments
    check_at_least(parser, arguments, workers=1, max_bytes=1, vocab_size=5 if arguments.words else 261, min_freq=1)
    if not arguments.words and arguments.vocab_size is None:
        parser.error("--vocab-size: found none, expected the pieces of the sentencepiece model; or take --words")
    return arguments


def _share(text: str) -> float:
    """'5%' or '0.05' -> 0.05. Raises ArgumentTypeError."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a share such as 5%")
    return share


def _limit(text: str) -> BadLimit:
    return BadLimit(count=int(text)) if text.isdecimal() else BadLimit(share=_share(text))


def _encoding(text: str) -> str:
    try:
        "a".encode(text)
    except LookupError:
        example = "utf-16, gb18030, shift_jis, cp1251"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected an encoding of text such as {example}") from None
    return text


def _options(arguments: argparse.Namespace, sides: Sequence[str] = ()) -> TextOptions:
    plain = frozenset(f".{suffix.lower().lstrip('.')}" for suffix in arguments.plain_text)
    return TextOptions(
        text_key=arguments.text_key,
        prompt_key=arguments.prompt_key,
        response_key=arguments.response_key,
        plain=plain,
        encoding=arguments.encoding,
        max_bad=arguments.max_bad_records,
        sides=tuple(sides),
    )


def train(arguments: argparse.Namespace) -> int:
    """Train and save a tokenizer. Exit code."""
    console, tally = ToolConsole(), Tally(arguments.max_bad_records)
    of_sides = [_options(arguments, [side]) for side in arguments.side] or [_options(arguments)]
    rules = arguments.rules or default_rules((arguments.side or ["xx"])[0])
    max_bytes = arguments.max_bytes or (sys.maxsize if arguments.words else MAX_BYTES)
    what = f"words by {rules}" if arguments.words else f"{arguments.vocab_size} pieces"
    with _bars(console) as bars:
        task = bars.add_task("reading text", total=None, size="")

        def texts() -> Iterator[str]:
            progress = _reporter("reading text", bars, task, console)
            for options in of_sides:
                yield from sample_text(arguments.input, options, max_bytes, tally, progress)
            bars.update(task, description=f"training {what}", total=None)
            if not console.is_terminal:
                print(f"training {what}", flush=True)

        if arguments.words:
            train_words(texts(), arguments.output, rules, arguments.min_freq, arguments.vocab_size)
            tokenizer = Tokenizer(arguments.output)
        else:
            tokenizer = train_tokenizer(texts(), arguments.output, arguments.vocab_size, arguments.workers)
        bars.update(task, total=1, completed=1)
    print(f"{tokenizer.path}: {tokenizer.vocab_size} pieces, sha256 {tokenizer.sha256[:12]}")
    for line in tally.lines():
        print(line)
    return 0


def encode(arguments: argparse.Namespace) -> int:
    """Tokenise each input folder and print statistics. Exit code."""
    output: Path = arguments.output
    valid = output.with_name("valid" if output.name == "train" else f"{output.name}_valid")
    targets = {source.resolve().name: source for source in arguments.input}
    if len(targets) < len(arguments.input):
        raise DataError("--input: two folders of the same name would become one data folder; rename one of them")
    if unprintable := [name for name in targets if not name.isprintable()]:
        raise DataError(f"--input: found folder {unprintable[0]!r}, expected a printable name; rename it")
    tokenizer = Tokenizer(arguments.tokenizer)
    of_sources = Tokenizer(arguments.source_tokenizer or arguments.tokenizer).path if arguments.pair else None
    options, console = _options(arguments, arguments.pair), ToolConsole()
    holds_out = arguments.holdout or arguments.split_at is not None
    found: dict[str, Metadata] = {}
    notes = []
    with _bars(console) as bars:
        for name, source in targets.items():
            progress = _reporter(name, bars, bars.add_task(name, total=None, size=""), console)
            encoder = FolderEncoder(
                tokenizer.path,
                arguments.workers,
                options,
                arguments.holdout,
                split_at=arguments.split_at,
                bare=arguments.without_bos_eos,
                source_tokenizer_path=of_sources,
                progress=progress,
            )
            held_out = valid / name if holds_out else None
            made = encoder.encode(source, output / name, held_out=held_out, overwrite=arguments.overwrite)
            found[name] = made.metadata
            if made.source:
                found[f"{name} (sources)"] = made.source
            if made.held_out:
                found[f"{name} (held out)"] = made.held_out
            notes += [f"{name}: {line}" for line in made.notes]
    console.print(_statistics(found))
    if holds_out:
        notes.append(f"train on them with data.train_folder={output} data.valid_folder={valid}")
    for note in notes:
        print(note)
    return 0


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[size]}"))
    return Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )


def _reporter(name: str, bars: Progress, task: TaskID, console: Console) -> TextProgress:
    """A progress callback: advances a bar on a terminal, else prints a line every HEARTBEAT_SECONDS."""
    done, last = 0, time.monotonic()

    def report(n_bytes: int, total_bytes: int) -> None:
        nonlocal done, last
        done += n_bytes
        bars.update(task, completed=done, total=max(done, total_bytes), size=human_bytes(done))
        if not console.is_terminal and time.monotonic() - last >= HEARTBEAT_SECONDS:
            last = time.monotonic()
            print(f"{name}: {human_bytes(done)} of about {human_bytes(total_bytes)}", flush=True)

    return report


def _statistics(found: dict[str, Metadata]) -> Table:
    table = Table("folder", "documents", "tokens", "text", "bytes/token", "longest (tokens)", title="tokenised data")
    for name, data in found.items():
        table.add_row(
            escape(name),
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
