"""Documents of raw text below a folder, for the tokenizer.

.jsonl     one document a line: {"text": ...}, or {"prompt": ..., "response": ...} to train on the response only
.parquet   one document a row (needs pyarrow)
.txt .md .py ...   one document a file
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.errors import DataError, MissingPackageError

TEXT_SUFFIXES = frozenset(
    {".txt", ".md", ".rst", ".tex", ".html", ".xml", ".csv", ".json", ".yaml", ".yml", ".toml", ".ini", ".cfg"}
    | {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cuh", ".cu", ".java", ".js", ".ts", ".go", ".rs", ".rb"}
    | {".php", ".pl", ".lua", ".r", ".jl", ".scala", ".kt", ".swift", ".cs", ".sh", ".sql", ".css", ".cmake", ".proto"}
)


@dataclass(frozen=True)
class TextDocument:
    """A text to train on, and the prompt before it, which is context only."""

    text: str
    prompt: str = ""


@dataclass(frozen=True)
class TextFile:
    """A file with one or more documents."""

    path: Path
    n_bytes: int
    has_prompts: bool


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Context in which errors of reading `path` are raised as DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; correct or remove it") from None


def find_text(folder: Path, text_key: str) -> list[TextFile]:
    """All files with text below `folder`, by path; hidden ones are skipped.

    Raises DataError when the folder is missing or has no text, or a file cannot be read.
    """
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in sorted(names):
            suffix = Path(name).suffix.lower()
            if name[0] != "." and (suffix in TEXT_SUFFIXES or suffix in (".jsonl", ".parquet")):
                path = Path(where, name)
                with readable(path):
                    has_prompts = suffix == ".jsonl" and _has_prompts(path, text_key)
                    found.append(TextFile(path, path.stat().st_size, has_prompts))
    if not found:
        raise DataError(
            f"{folder}: {'holds no text' if folder.is_dir() else 'is no folder'}, expected a folder with .jsonl, "
            f".parquet, .txt, .md or source files"
        )
    return found


def read_documents(file: TextFile, text_key: str) -> Iterator[TextDocument]:
    """The documents of a file in order, without empty ones. Raises DataError naming the line that cannot be read."""
    suffix = file.path.suffix.lower()
    with readable(file.path):
        if suffix == ".jsonl":
            documents = _read_jsonl(file, text_key)
        elif suffix == ".parquet":
            documents = _read_parquet(file.path, text_key)
        else:
            documents = iter([TextDocument(file.path.read_text(encoding="utf-8", errors="replace"))])
        yield from (document for document in documents if document.text)


def sample_text(folders: Sequence[Path], text_key: str, max_bytes: int) -> Iterator[str]:
    """About `max_bytes` of text to train a tokenizer on: equal parts per folder, documents selected by their hash."""
    for folder in folders:
        files = find_text(folder, text_key)
        kept = max_bytes / len(folders) / max(1, sum(file.n_bytes for file in files))
        for file in files:
            for document in read_documents(file, text_key):
                text = document.prompt + document.text
                if zlib.crc32(text.encode("utf-8", "replace")) < kept * 2**32:
                    yield text


def _has_prompts(path: Path, text_key: str) -> bool:
    """Whether the first line has a prompt and a response instead of a text."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        first = next((line for line in lines if line.strip()), None)
    if first is None:
        return False
    record = _parse(first, f"{path}:1")
    return text_key not in record and "prompt" in record and "response" in record


def _read_jsonl(file: TextFile, text_key: str) -> Iterator[TextDocument]:
    keys = ("prompt", "response") if file.has_prompts else (text_key,)
    with file.path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record = _parse(line, f"{file.path}:{number}")
            values = [record.get(key) for key in keys]
            if not all(isinstance(value, str) for value in values):
                like = " as on line 1" if number > 1 else ""
                raise DataError(
                    f"{file.path}:{number}: found keys {', '.join(record) or 'none'}, expected text under "
                    f"{' and '.join(map(repr, keys))}{like}; correct the file, or name the key with --text-key"
                )
            yield TextDocument(text=str(values[-1]), prompt=str(values[0]) if file.has_prompts else "")


def _parse(line: str, where: str) -> dict:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(
            f"{where}: expected a JSON object, found damage ({error}); correct or remove the line"
        ) from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: found {type(record).__name__}, expected a JSON object; correct or remove the line")
    return record


def _read_parquet(path: Path, text_key: str) -> Iterator[TextDocument]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise MissingPackageError(
            f"{path}: reading parquet needs pyarrow: pip install 'internlm_lite[parquet]'"
        ) from None
    table = pyarrow.parquet.ParquetFile(path)
    if text_key not in table.schema_arrow.names:
        raise DataError(
            f"{path}: found columns {', '.join(table.schema_arrow.names)}, expected {text_key!r}; "
            f"name the column with --text-key"
        )
    for batch in table.iter_batches(columns=[text_key]):
        yield from (TextDocument(text) for text in batch.column(0).to_pylist() if text)
