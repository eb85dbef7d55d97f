"""Documents of raw text below a folder, for the tokenizer.

.jsonl .json       one document a record: {"text": ...}, or {"prompt": ..., "response": ...}: trains on the response
.csv .tsv .parquet one document a row, with columns of these names (parquet needs pyarrow)
.txt .md .py ...   one document a file; a .json file of one object without these keys is one too
NAME.de NAME.en    pairs, if they are asked for: line by line; records as above have both under "de" and "en"

Each may be compressed: .gz, .bz2, .xz, .zst (needs zstandard).
"""

from __future__ import annotations

import csv
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path

from internlm_lite.data.files import kind_of, walk_once
from internlm_lite.data.text_files import (
    DECOMPRESSORS,
    LONGEST_RECORD_BYTES,
    BadLimit,
    Tally,
    all_lines,
    readable,
    suffix_of,
    text_lines,
    whole_text,
)
from internlm_lite.errors import DataError, MissingPackageError

PLAIN_SUFFIXES = frozenset(
    {".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".log"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cuh", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb"}
    | {".php", ".pl", ".lua", ".r", ".jl", ".scala", ".kt", ".swift", ".cs", ".sh", ".sql", ".css", ".cmake", ".proto"}
)
COMPRESSION = 4
"""Text bytes per compressed byte, to guess the work in a file."""
SEARCHED_RECORDS = 100
"""Records at the start of a file in which the keys of its text are looked for."""
BY_TEMPLATE = "write the turns into prompt and response as your chat template says"
SHAPES: dict[tuple[str, ...], tuple[str, str]] = {
    ("messages",): ("a chat of OpenAI", BY_TEMPLATE),
    ("conversations",): ("ShareGPT", BY_TEMPLATE),
    ("instruction", "output"): ("Alpaca", "write instruction and input into prompt, output into response"),
    ("chosen", "rejected"): ("preferences (DPO)", "training is on text: --response-key chosen, if that is one"),
    ("prompt", "completion"): ("prompt and completion", "--response-key completion"),
    ("question", "answer"): ("questions", "--prompt-key question --response-key answer"),
}
"""Keys of a known shape of records -> its name, and what to do about it."""

Record = dict[str, object]


@dataclass(frozen=True)
class TextOptions:
    """How text is found and read."""

    text_key: str = "text"
    """Key or column of the text."""
    prompt_key: str = "prompt"
    response_key: str = "response"
    plain: frozenset[str] = frozenset()
    """More suffixes, such as .json, whose files are one document each."""
    encoding: str | None = None
    """Of files without a byte order mark; None: UTF-8, or Latin-1 where it is not."""
    max_bad: BadLimit = field(default_factory=lambda: BadLimit(share=0.01))
    sides: tuple[str, ...] = ()
    """Of pairs: the keys of source and target, or of one of them, which are the suffixes of files with a text a line. A
    pair is read as a prompt and a response."""


DEFAULTS = TextOptions()


@dataclass(frozen=True)
class TextDocument:
    """A text to train on, and the prompt before it, which is context only."""

    text: str
    prompt: str = ""


TextProgress = Callable[[int, int], None]
"""Called with the bytes of text read or encoded since its last call, and about how many there are in all."""
Reader = Callable[[Path, TextOptions, Tally], Iterator[tuple[str, Record]]]
"""(path, options, tally) -> (place, record) of all records that are whole; others are counted in the tally."""


@dataclass(frozen=True)
class TextFile:
    """A file with one or more documents."""

    path: Path
    n_bytes: int
    """About its bytes of text."""
    read: Reader
    keys: tuple[str, ...]
    """Key of the text, or those of prompt and response."""

    @property
    def has_prompts(self) -> bool:
        return len(self.keys) > 1


def find_text(folder: Path, options: TextOptions, tally: Tally) -> list[TextFile]:
    """All files with text below `folder`, by path; `tally` counts the others.

    Raises DataError when the folder is missing or has no text, or a file cannot be read.
    """
    if (kind := kind_of(folder)) != "a folder":
        raise DataError(f"{folder} is {kind}, expected a folder with text; correct the path")
    found = []
    for where, names, n_hidden in walk_once(folder):
        if n_hidden:
            tally.note("hidden files and folders, left out", where, n_hidden)
        for path in (where / name for name in names):
            with readable(path):
                status, kind = path.stat(), kind_of(path)
                reader = _reader(path, options)
                if len(options.sides) > 1 and suffix_of(path) == f".{options.sides[1]}":
                    _beside(path, options.sides[0])  # is read with it
                elif kind != "a file" or reader is None:
                    what = kind if kind != "a file" else path.suffix.lower() or "files without a suffix"
                    tally.note(f"{what}, left out", path)
                else:
                    size = status.st_size
                    if reader is _read_sides and len(options.sides) > 1:
                        size += _beside(path, options.sides[1]).stat().st_size
                    n_bytes = size * (COMPRESSION if path.suffix.lower() in DECOMPRESSORS else 1)
                    found.append(TextFile(path, n_bytes, *_how_to_read(path, reader, options, tally)))
    if not found:
        if options.sides:
            raise DataError(
                f"{folder}: holds no text of {' and '.join(map(repr, options.sides))}, expected files with "
                f"{' or '.join(f'.{side}' for side in options.sides)} at their end, line by line, or records with such "
                f"keys; found {'; '.join(tally.lines()) or 'no file'}; name the sides of the text"
            )
        raise DataError(
            f"{folder}: holds no text, expected .jsonl, .json, .csv, .parquet, .txt, .md or source files; "
            f"found {'; '.join(tally.lines()) or 'no file'}; --plain-text .SUFFIX takes others as text"
        )
    return found


def read_documents(file: TextFile, options: TextOptions, tally: Tally) -> Iterator[TextDocument]:
    """The documents of a file in order; `tally` counts records without text.

    Raises DataError when the file is damaged, or too many records are bad.
    """
    with readable(file.path):
        for place, record in file.read(file.path, options, tally):
            values = [record.get(key) for key in file.keys]
            if why := _why_no_text(record, file.keys, both=bool(options.sides)):
                tally.refuse(why, place)
            else:
                tally.records += 1
                yield TextDocument(text=str(values[-1]), prompt=str(values[0]) if file.has_prompts else "")


def sample_text(
    folders: Sequence[Path], options: TextOptions, max_bytes: int, tally: Tally, progress: TextProgress
) -> Iterator[str]:
    """About `max_bytes` of text to train a tokenizer on: equal parts per folder, documents selected by their hash."""
    found = [find_text(folder, options, tally) for folder in folders]
    sizes = [sum(file.n_bytes for file in files) for files in found]
    for files, size in zip(found, sizes, strict=True):
        kept = max_bytes / len(folders) / max(1, size)
        for document in (document for file in files for document in read_documents(file, options, tally)):
            text = (document.prompt + document.text).encode("utf-8", "replace")
            progress(len(text), sum(sizes))
            if zlib.crc32(text) < kept * 2**32:
                yield text.decode()


def _why_no_text(record: Record, keys: Sequence[str], *, both: bool) -> str:
    """What is wrong with the text of a record; '' if nothing is. `both`: a prompt may not be empty, either."""
    for key in keys:
        if key not in record:
            return f"no {key!r}"
        if not isinstance(record[key], str):
            return f"{'null' if record[key] is None else type(record[key]).__name__} under {key!r}"
    empty = [key for key in (keys if both else keys[-1:]) if not (str(record[key]).strip() if both else record[key])]
    return f"empty {empty[0]!r}" if empty else ""


def _reader(path: Path, options: TextOptions) -> Reader | None:
    suffix = suffix_of(path)
    if options.sides:
        return _read_sides if suffix == f".{options.sides[0]}" else READERS.get(suffix)
    return _read_plain if suffix in PLAIN_SUFFIXES | options.plain else READERS.get(suffix)


def _how_to_read(path: Path, reader: Reader, options: TextOptions, tally: Tally) -> tuple[Reader, tuple[str, ...]]:
    """The reader, and the keys of the text, which the first records show. Raises DataError if they do not."""
    pair = (options.prompt_key, options.response_key)
    if reader is _read_plain:
        return reader, (options.text_key,)
    if reader is _read_sides:
        return reader, options.sides
    everything = Tally(BadLimit(share=1.0))  # those that are bad are counted when the file is read
    records = list(islice(reader(path, options, everything), SEARCHED_RECORDS))
    if options.sides:
        if not any(all(key in record for key in options.sides) for _, record in records):
            found = f"{records[0][0]}: found keys {_names(records[0][1])}" if records else f"{path}: found no record"
            raise DataError(
                f"{found}, expected {' and '.join(map(repr, options.sides))}, the sides of pairs; name them"
            )
        return reader, options.sides
    for _, record in records:
        if options.text_key in record:
            return reader, (options.text_key,)
        if all(key in record for key in pair):
            return reader, pair
    if not records:
        return reader, (options.text_key,)
    place, record = records[0]
    for keys, (shape, what) in SHAPES.items():
        if record.keys() >= set(keys):
            raise DataError(f"{place}: this looks like {shape}, found keys {_names(record)}: {what}")
    if reader is _read_json and len(records) == 1:
        tally.note(f"JSON without {options.text_key!r}, read as one document", path)
        return _read_plain, (options.text_key,)
    raise DataError(
        f"{place}: found keys {_names(record)}, expected text under {options.text_key!r}, or under {pair[0]!r} and "
        f"{pair[1]!r}; name them with --text-key, or --prompt-key and --response-key; "
        f"--plain-text {suffix_of(path)} takes files as they are"
    )


def _names(record: Record) -> str:
    return ", ".join(repr(key)[1:-1] for key in record)[:200] or "none"


def _read_plain(path: Path, options: TextOptions, tally: Tally) -> Iterator[tuple[str, Record]]:
    text = whole_text(path, options.encoding, tally)
    if text:
        yield str(path), {options.text_key: text}
    elif text is not None:
        tally.note("empty files, left out", path)


def _read_sides(path: Path, options: TextOptions, tally: Tally) -> Iterator[tuple[str, Record]]:
    """The lines of one side, or of both side by side. Raises DataError if one has more than the other."""
    paths = [path, *(_beside(path, key) for key in options.sides[1:])]
    sides = [all_lines(one, options.encoding, tally) for one in paths]
    for number, lines in enumerate(zip_longest(*sides), 1):
        if None in lines:
            longer, shorter = (paths[lines.index(None) - 1], paths[lines.index(None)])
            raise DataError(
                f"{longer}:{number}: found no line {number} in {shorter}, which ends before it; expected as many lines "
                "in both, those of a pair at the same place: correct the files"
            )
        texts = [line for _, line in lines]
        if None not in texts:
            yield lines[0][0], {key: str(text).strip() for key, text in zip(options.sides, texts, strict=True)}


def _beside(path: Path, key: str) -> Path:
    """The file of the other side: x.de -> x.en. Raises DataError if there is none."""
    name = path.name[: -len(path.suffix)] if path.suffix.lower() in DECOMPRESSORS else path.name
    stem = name.rpartition(".")[0]
    found = [other for end in ("", *DECOMPRESSORS) if (other := path.with_name(f"{stem}.{key}{end}")).exists()]
    if not found:
        raise DataError(f"{path}: found no {stem}.{key} beside it, expected the other side of its pairs; copy it there")
    return found[0]


def _read_lines(path: Path, options: TextOptions, tally: Tally) -> Iterator[tuple[str, Record]]:
    for place, line in text_lines(path, options.encoding, tally):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            tally.refuse("damaged JSON", f"{place} {error}")
            continue
        if isinstance(record, dict):
            yield place, record
        else:
            tally.refuse("no JSON object", place)


def _read_json(path: Path, options: TextOptions, tally: Tally) -> Iterator[tuple[str, Record]]:
    """Records of JSON lines, of an array, or of objects one after another."""
    _, first = next(text_lines(path, options.encoding, Tally(BadLimit(share=1.0))), ("", ""))
    try:
        is_lines = first.lstrip().startswith("{") and bool(json.loads(first))
    except (ValueError, RecursionError):
        is_lines = False
    if is_lines:
        yield from _read_lines(path, options, tally)
        return
    for line, record in _values(path, whole_text(path, options.encoding, tally) or ""):
        if isinstance(record, dict):
            yield f"{path}:{line}", record
        else:
            tally.refuse("no JSON object", f"{path}:{line}")


def _values(path: Path, text: str) -> Iterator[tuple[int, object]]:
    """(line, value) of the elements of an array, or of values one after another."""
    decoder, between = json.JSONDecoder(), re.compile(r"[\s,]*")
    at, line, counted = len(text) - len(text.lstrip()), 1, 0
    is_array = text.startswith("[", at)
    at += is_array
    while True:
        at = between.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text) or (is_array and text[at] == "]"):
            break
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: expected JSON, found damage ({error}); correct the file") from None
        yield line, value
    if is_array and text[at:].strip() != "]":
        raise DataError(f"{path}:{line}: expected one array, found no end of it, or more behind it; correct the file")


def _read_table(path: Path, options: TextOptions, tally: Tally, *, delimiter: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(LONGEST_RECORD_BYTES)  # 128 KiB otherwise
    lines = (line for _, line in text_lines(path, options.encoding, tally))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)  # strict: an open quote would swallow rows
    try:
        names = next(rows, [])
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if len(row) == len(names):
                yield place, dict(zip(names, row, strict=True))
            elif row:
                tally.refuse(f"rows that have not as many columns as the header, {len(names)}", place)
    except csv.Error as error:
        raise DataError(f"{path}:{rows.line_num}: {error}; correct the file, or write it as JSON lines") from None


def _read_parquet(path: Path, options: TextOptions, tally: Tally) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: reading parquet needs pyarrow: pip install 'internlm_lite[parquet]'"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [key for key in (options.text_key, options.prompt_key, options.response_key) if key in names]
        row = 0
        for batch in table.iter_batches(columns=wanted or names):
            for record in batch.to_pylist():
                yield f"{path} row {(row := row + 1)}", record
    except pyarrow.ArrowException as error:
        raise OSError(str(error)) from None


READERS: dict[str, Reader] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_json,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".parquet": _read_parquet,
}
"""Suffix -> reader of records. Files of PLAIN_SUFFIXES are one document each."""
