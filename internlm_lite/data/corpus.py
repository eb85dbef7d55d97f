"""Real text that every machine with our environment has, as folders of JSON lines; `make demo` trains on it.

    code   sources of the Python standard library        docs   docstrings, READMEs and documentation texts
    cpp    the C++ headers that come with torch          legal  licences and copyright notices

    target/train/<folder>/text.jsonl, target/valid/<folder>/text.jsonl      one {"source", "text"} a line

The selection of documents, their order and the split are pure functions of their names (crc32), so a machine always
builds the same corpus.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import sysconfig
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.errors import DataError
from internlm_lite.units import human_bytes

HELD_OUT = 40
"""One of this number of documents is held out for validation."""
SHORTEST_CHARACTERS, LONGEST_CHARACTERS = 200, 200_000
"""Shorter documents have little content; longer ones are tables and generated code."""
SKIPPED_DIRECTORIES = frozenset({"site-packages", "dist-packages", "test", "tests", "testing", "__pycache__", "ops"})
"""`ops`: the thousands of generated headers of torch/include/ATen/ops."""
LISTINGS = frozenset(
    {"RECORD.txt", "SOURCES.txt", "entry_points.txt", "top_level.txt", "requires.txt", "CMakeLists.txt"}
)

Sourced = tuple[str, str]
"""(source, text) of a document; the source is a name that does not depend on the machine."""


@dataclass(frozen=True)
class FolderSize:
    """The size of a corpus folder."""

    documents: int
    train_bytes: int
    valid_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.train_bytes + self.valid_bytes


def machine_folders() -> dict[str, Callable[[], Iterator[Sourced]]]:
    """Folder name -> iterator of its documents, from the files of the running Python."""
    paths = sysconfig.get_paths()
    library, packages = Path(paths["stdlib"]), Path(paths["purelib"])
    is_python, is_prose = _ends_with(".py"), _ends_with(".md", ".rst", ".txt", "METADATA")

    def docs() -> Iterator[Sourced]:
        yield from _docstrings(_files(library, "python", is_python))
        yield from _texts(_files(packages, "", is_prose))
        yield from _docstrings(_files(packages, "", is_python))

    def legal() -> Iterator[Sourced]:
        yield from _texts(_files(packages, "", _is_notice))
        yield from _texts(_files(Path("/usr/share/doc"), "system", lambda name: name == "copyright"))

    return {
        "code": lambda: _texts(_files(library, "python", is_python)),
        "docs": docs,
        "cpp": lambda: _texts(_files(packages / "torch" / "include", "torch", _ends_with(".h", ".hpp", ".cuh"))),
        "legal": legal,
    }


def build_corpus(
    target: Path,
    folders: Mapping[str, Callable[[], Iterable[Sourced]]],
    folder_bytes: int,
    needed_folders: int = 3,
    needed_bytes: int = 10_000_000,
) -> dict[str, FolderSize]:
    """Write at most about `folder_bytes` of text per folder below `target`; folders without text are skipped.

    Raises DataError when fewer than `needed_folders` folders or `needed_bytes` bytes were found.
    """
    sizes = {}
    for name, documents in folders.items():
        size = _write_folder(target, name, documents(), folder_bytes)
        if size.train_bytes and size.valid_bytes:
            sizes[name] = size
    total = sum(size.total_bytes for size in sizes.values())
    if len(sizes) < needed_folders or total < needed_bytes:
        found = ", ".join(f"{name} {human_bytes(size.total_bytes)}" for name, size in sizes.items()) or "nothing"
        raise DataError(
            f"this machine holds too little text for the demo: found {found}; expected {needed_folders} folders and "
            f"{human_bytes(needed_bytes)}; install a Python with its standard library as .py files, or tokenise your "
            "own text with tools/tokenizer.py"
        )
    return sizes


def _write_folder(target: Path, name: str, documents: Iterable[Sourced], limit_bytes: int) -> FolderSize:
    """Write the distinct documents of one folder, split into train and valid by their source."""
    written = {"train": 0, "valid": 0}
    seen: set[str] = set()
    files = {}
    for part in written:
        path = target / part / name / "text.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        files[part] = path.open("w", encoding="utf-8")
    try:
        for source, text in documents:
            if text in seen or not SHORTEST_CHARACTERS <= len(text) <= LONGEST_CHARACTERS:
                continue
            seen.add(text)
            part = "valid" if zlib.crc32(source.encode()) % HELD_OUT == 0 else "train"
            files[part].write(json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n")
            written[part] += len(text.encode())
            if sum(written.values()) >= limit_bytes:
                break
    finally:
        for file in files.values():
            file.close()
    return FolderSize(documents=len(seen), train_bytes=written["train"], valid_bytes=written["valid"])


def _files(root: Path, prefix: str, wanted: Callable[[str], bool]) -> list[tuple[str, Path]]:
    """(source, path) of the wanted files below `root`, ordered by a hash of their names: a prefix is a fair sample."""
    found = []
    for directory, children, names in os.walk(root):
        children[:] = [child for child in children if child not in SKIPPED_DIRECTORIES]
        for name in filter(wanted, names):
            path = Path(directory, name)
            found.append((f"{prefix}/{path.relative_to(root).as_posix()}".lstrip("/"), path))
    return sorted(found, key=lambda file: (zlib.crc32(file[0].encode()), file[0]))


def _texts(files: Iterable[tuple[str, Path]]) -> Iterator[Sourced]:
    """(source, text) of the files that are UTF-8 text, with carriage returns removed."""
    for source, path in files:
        try:
            yield source, path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue


def _docstrings(files: Iterable[tuple[str, Path]]) -> Iterator[Sourced]:
    """One document per Python file: all its docstrings, each preceded by the dotted name of its object."""
    for source, text in _texts(files):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # for invalid escapes in third-party sources
                tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        module = source.removeprefix("python/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if described := list(_described(tree, module)):
            yield source, "\n\n\n".join(described)


def _described(node: ast.AST, name: str) -> Iterator[str]:
    """Name, blank line and docstring of `node`, and of every class and function inside it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield f"{name}\n\n{inspect.cleandoc(docstring)}"
    for child in ast.iter_child_nodes(node):
        inner = getattr(child, "name", None) if isinstance(child, ast.stmt) else None
        yield from _described(child, f"{name}.{inner}" if inner else name)


def _ends_with(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: name.endswith(suffixes) and name not in LISTINGS and not _is_notice(name)


def _is_notice(name: str) -> bool:
    return name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"))
