"""Finds tokenised files and groups them into data folders, for which loss and accuracy are reported separately.

train_folder/code/a.bin        -> folder "code"
train_folder/docs/x/y/b.bin    -> folder "docs": all files below a sub-folder belong to it
train_folder/a.bin             -> folder "train_folder", if no sub-folder holds data

Of pairs, a.bin holds the targets and a.source.bin beside it their sources, which no decoder reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.data.documents import Documents, EmptyFileError
from internlm_lite.data.dummy import CopiedDocuments, DummyDocuments
from internlm_lite.data.files import kind_of, require_file, walk_once
from internlm_lite.data.internlm import InternLMDocuments
from internlm_lite.data.megatron import MegatronDocuments
from internlm_lite.errors import DataError

logger = logging.getLogger("internlm_lite")

FORMATS: dict[str, Callable[[Path], Documents]] = {".idx": MegatronDocuments, ".bin.meta": InternLMDocuments}
"""Suffix of the index file of NAME.bin -> reader of both files."""
SOURCE = ".source"
"""NAME.source.bin holds the sources of the targets in NAME.bin, one by one."""


@dataclass(frozen=True)
class Folder:
    """One data folder of a run."""

    name: str
    files: Sequence[Documents]
    is_dummy: bool = False
    """Whether it is the built-in set: documents of all lengths are used, and label id 0 is ignored."""
    sources: Sequence[Documents] = ()
    """Of pairs: beside each file of targets one with as many sources."""


def dummy_folder(seq_len: int) -> Folder:
    """The built-in data set as a data folder."""
    return Folder("dummy", (DummyDocuments(seq_len),), is_dummy=True)


def dummy_pairs(length: int, vocab_sizes: tuple[int, int]) -> Folder:
    """The built-in set of pairs, a copy of `length` symbols each, as a data folder."""
    documents = CopiedDocuments(length, min(vocab_sizes))
    return Folder("copy", (documents,), sources=(documents,))


def find_folders(root: Path, key: str, *, log: bool = True, pairs: bool = False) -> list[Folder]:
    """The data folders below `root`, by name; `key` is the config key that names `root`, for messages.
    `log`: warn of files that are not used. `pairs`: with the sources of each file.

    Raises DataError when `root` is missing, holds nothing tokenised, or holds a damaged file, or one without sources.
    """
    level = logging.WARNING if log else logging.DEBUG
    if (kind := kind_of(root)) != "a folder":
        raise DataError(
            f"data.{key}: {root} is {kind}, expected a folder of tokenised data; "
            f"correct the path, or make the data with tools/tokenizer.py encode"
        )
    try:
        shown = {path: path.is_dir() for path in sorted(root.iterdir()) if path.name[0] != "."}
    except OSError as error:
        raise DataError(f"data.{key}: {root}: {error.strerror}; correct its permissions") from None
    below = {path.name: _bins(path) for path, is_folder in shown.items() if is_folder}
    grouped = {name: bins for name, bins in below.items() if bins}
    for name in grouped:
        if not name.isprintable():
            raise DataError(
                f"data.{key}: folder {name!r} in {root} has a name that no log line can hold; expected printable "
                "characters: rename it"
            )
    direct = _bins_of(root, [path.name for path, is_folder in shown.items() if not is_folder])
    if direct and grouped:
        logger.log(
            level,
            "data.%s: %d tokenised files directly in %s are not used, as its sub-folders hold data: move them into one",
            *(key, len(direct), root),
        )
    elif direct:
        grouped = {root.resolve().name: direct}
    if not grouped:
        raise DataError(
            f"data.{key}: {root} holds no tokenised data (NAME.bin with NAME.idx or NAME.bin.meta) in any sub-folder; "
            f"make it with tools/tokenizer.py encode"
        )
    opened = {name: _open_shards(bins, level) for name, bins in grouped.items()}
    if not any(opened.values()):
        raise DataError(f"data.{key}: all tokenised files in {root} are empty; make them again from text")
    return [
        Folder(name, files, sources=tuple(map(_open_source, files)) if pairs else ())
        for name, files in opened.items()
        if files
    ]


def _open_source(target: Documents) -> Documents:
    path = target.path.with_name(f"{target.path.stem}{SOURCE}.bin")
    if not path.exists():
        raise DataError(
            f"{target.path}: found no {path.name} beside it, expected the sources of its documents, as "
            "model.num_encoder_layers asks for; make both with tools/tokenizer.py encode --pair, or set it to 0"
        )
    source = open_documents(path)
    if len(source.lengths) != len(target.lengths):
        raise DataError(
            f"{path}: found {len(source.lengths)} documents, expected {len(target.lengths)}, one for each of "
            f"{target.path.name}; tokenise the folder again, or copy both files again"
        )
    return source


def _open_shards(bins: Sequence[Path], level: int) -> tuple[Documents, ...]:
    """The files that hold tokens; others are logged with `level`."""
    opened = []
    for path in bins:
        try:
            opened.append(open_documents(path))
        except EmptyFileError:
            logger.log(level, "%s: holds no document and is left out; tokenise it again if it should hold some", path)
    return tuple(opened)


def open_documents(bin_path: Path) -> Documents:
    """Open a tokenised file in the format of its index. Raises DataError."""
    try:
        if not bin_path.exists():
            raise DataError(f"{bin_path}: missing, although its index is there; copy both files, or delete the index")
        require_file(bin_path)
        for suffix, documents in FORMATS.items():
            if bin_path.with_name(bin_path.stem + suffix).exists():
                return documents(bin_path)
    except OSError as error:
        raise DataError(f"{bin_path}: cannot be read ({error}); correct its permissions or copy it again") from None
    raise DataError(
        f"{bin_path}: found no index, expected {bin_path.stem}.idx (Megatron-LM) or {bin_path.name}.meta (InternLM) "
        f"beside it; copy the index too, or tokenise the folder again"
    )


def _bins(folder: Path) -> list[Path]:
    """Paths of all .bin files below `folder`, also missing ones that have an index. Follows symbolic links."""
    return [path for where, names, _ in walk_once(folder) for path in _bins_of(where, names)]


def _bins_of(folder: Path, names: Sequence[str]) -> list[Path]:
    suffixes = (".bin", *FORMATS)
    stems = {name.removesuffix(suffix) for suffix in suffixes for name in names if name.endswith(suffix)}
    sources = {stem for stem in stems if stem.endswith(SOURCE) and stem.removesuffix(SOURCE) in stems}
    return [folder / f"{stem}.bin" for stem in sorted(stems - sources)]
