"""Tokenises folders of text in several processes; each input folder becomes one data folder of native files.

    IN/code/**/*.py  ->  OUT/code/{code.bin, code.idx, code.meta.json}       document = bos + text + eos
    IN/help/x.{de,en} -> OUT/help/{help.*, help.source.*}                    pairs: the targets, and their sources

Documents held out for validation go to a second folder. A hash of their text chooses them, so that the choice depends
on nothing else, and copies of a text are on one side. Or every text is cut, and its end goes there.

A folder is written to OUT/.code.partial and renamed when it is complete, so that an interrupted run leaves no partial
folder. While it is replaced, the old folder is OUT/.code.replaced; the next run restores it after an interruption.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import numpy as np

from internlm_lite.data.documents import Metadata, metadata_path
from internlm_lite.data.folders import SOURCE
from internlm_lite.data.megatron import MegatronWriter, smallest_dtype, writing
from internlm_lite.data.text import (
    DEFAULTS,
    TextDocument,
    TextFile,
    TextOptions,
    TextProgress,
    find_text,
    read_documents,
)
from internlm_lite.data.text_files import Tally
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError, StorageError

BATCH_CHARACTERS = 1 << 18
"""Characters of text per task of a worker process."""


class Encoded(NamedTuple):
    """Several documents."""

    tokens: np.ndarray
    """Ids int32, back to back; those of prompts are negative."""
    lengths: np.ndarray
    """[documents] int64"""
    text_bytes: int
    """UTF-8 bytes of their text."""
    label_bytes: int
    """Of those without prompts."""


def encode_documents(tokenizer_path: Path, documents: Sequence[TextDocument], *, bare: bool = False) -> Encoded:
    """Tokenise documents. Prompts, including bos, become negative ids, see documents.py. `bare`: no bos and no eos."""
    tokenizer = _tokenizer(tokenizer_path)
    bos, eos = ([] if bare or token is None else [token] for token in (tokenizer.bos, tokenizer.eos))
    ids: list[list[int]] = []
    text_bytes = label_bytes = 0
    for document in documents:
        prompt = bos + tokenizer.encode(document.prompt)
        if document.prompt:
            prompt = [-token for token in prompt]
        ids.append(prompt + tokenizer.encode(document.text) + eos)
        own_bytes = len(document.text.encode("utf-8", "replace"))
        label_bytes += own_bytes
        text_bytes += len(document.prompt.encode("utf-8", "replace")) + own_bytes
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    flat = np.fromiter((token for tokens in ids for token in tokens), np.int32, int(lengths.sum()))
    return Encoded(flat, lengths, text_bytes, label_bytes)


def encode_sides(
    tokenizer_path: Path, source_path: Path | None, documents: Sequence[TextDocument], *, bare: bool = False
) -> list[Encoded]:
    """One for the file of `encode_documents`; with a tokenizer of sources one for the targets, and one for the prompts.

    Raises DataError where targets would have no end mark.
    """
    if source_path is None:
        return [encode_documents(tokenizer_path, documents, bare=bare)]
    of_targets = encode_documents(tokenizer_path, [TextDocument(document.text) for document in documents])
    of_sources = encode_documents(source_path, [TextDocument(document.prompt) for document in documents])
    return [of_targets, of_sources]


def _check_marks(tokenizer: Tokenizer) -> None:
    """A decoder begins with a mark and ends with one."""
    missing = [name for name, token in (("bos", tokenizer.bos), ("eos", tokenizer.eos)) if token is None]
    if missing:
        raise DataError(
            f"tokenizer {tokenizer.path}: found no {' and no '.join(missing)} token, expected both: targets "
            "begin and end with them; take another tokenizer, or make one with tools/tokenizer.py train"
        )


@lru_cache(2)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)  # once per worker process


class FolderPart:
    """A data folder that is being written."""

    def __init__(self, writer: MegatronWriter, unknown: int | None) -> None:
        self._writer = writer
        self._unknown = unknown
        self.n_unknown = 0
        names = ("documents", "tokens", "text_bytes", "label_bytes", "labels", "longest", "max_token")
        self.totals = dict.fromkeys(names, 0)

    def add(self, encoded: Encoded) -> None:
        tokens, lengths = encoded.tokens, encoded.lengths
        self._writer.add_many(tokens, lengths)
        firsts = np.cumsum(lengths[lengths > 0]) - lengths[lengths > 0]
        self.totals["labels"] += int(np.count_nonzero(tokens >= 0)) - int(np.count_nonzero(tokens[firsts] >= 0))
        if self._unknown is not None:
            self.n_unknown += int(np.count_nonzero(np.abs(tokens) == self._unknown))
        self.totals["documents"] += len(lengths)
        self.totals["tokens"] += len(tokens)
        self.totals["text_bytes"] += encoded.text_bytes
        self.totals["label_bytes"] += encoded.label_bytes
        self.totals["longest"] = max(self.totals["longest"], int(lengths.max()))
        self.totals["max_token"] = max(self.totals["max_token"], int(np.abs(tokens).max()))


@dataclass(frozen=True)
class EncodedFolder:
    """A data folder that was made."""

    metadata: Metadata
    held_out: Metadata | None
    """Of the documents held out for validation."""
    source: Metadata | None
    """Of pairs: of the sources to train on."""
    notes: list[str]
    """What was left out of the text, or read in doubt."""


@dataclass(frozen=True)
class FolderEncoder:
    """Tokenises folders of text."""

    tokenizer_path: Path
    workers: int = 1
    """Number of worker processes."""
    options: TextOptions = DEFAULTS
    holdout: float = 0.0
    """Share of the documents, chosen by a hash of their text, that is held out for validation."""
    split_at: float | None = None
    """Instead: share of the characters of every text after which it is cut; the rest is held out."""
    bare: bool = False
    """Documents are their text alone, without bos and eos."""
    source_tokenizer_path: Path | None = None
    """Documents are pairs (`options.sides`), and this is for their sources; the other one is for their targets."""
    progress: TextProgress = lambda n_bytes, total_bytes: None

    def encode(
        self, source: Path, target: Path, *, held_out: Path | None = None, overwrite: bool = False
    ) -> EncodedFolder:
        """Tokenise all text below `source` into the data folder `target`, and what is held out into `held_out`.

        Raises DataError on unreadable input, or when a folder exists without `overwrite`; StorageError when writing
        fails.
        """
        tally = Tally(self.options.max_bad)
        files = find_text(source, self.options, tally)
        with ExitStack() as folders:
            targets = [target, *filter(None, [held_out])]
            made = [folders.enter_context(replacing(folder, overwrite=overwrite)) for folder in targets]
            metadata, unknown = self._write(files, [folder / f"{target.name}.bin" for folder in made], tally)
        notes = [*_several_folders(source, files), *tally.lines(), *unknown]
        (of_targets, *of_sources), *held = metadata
        held_metadata, source_metadata = held[0][0] if held else None, of_sources[0] if of_sources else None
        return EncodedFolder(of_targets, held_metadata, source_metadata, notes)

    def _write(
        self, files: Sequence[TextFile], bin_paths: Sequence[Path], tally: Tally
    ) -> tuple[list[list[Metadata]], list[str]]:
        """Metadata of the documents to train on, and of those held out if there is a second path; of pairs of targets
        and sources. Notes on text that a tokenizer does not know."""
        pairs = [] if self.source_tokenizer_path is None else [self.source_tokenizer_path]
        tokenizers = [_tokenizer(path) for path in (self.tokenizer_path, *pairs)]
        if pairs:
            _check_marks(tokenizers[0])
        signed = not pairs and any(file.has_prompts for file in files)
        total_bytes = sum(file.n_bytes for file in files)
        documents = (document for file in files for document in read_documents(file, self.options, tally))
        with ExitStack() as writers:
            paths = [[path, path.with_name(f"{path.stem}{SOURCE}.bin")][: len(tokenizers)] for path in bin_paths]
            parts = [
                [
                    FolderPart(
                        writers.enter_context(writing(path, smallest_dtype(one.vocab_size, signed=signed))), one.unk
                    )
                    for path, one in zip(sides, tokenizers, strict=True)
                ]
                for sides in paths
            ]
            all_parts = self._parts(documents, files) if len(parts) > 1 else ((0, document) for document in documents)
            for index, encoded in self._encoded(_batched(all_parts)):
                for part, of_side in zip(parts[index], encoded, strict=True):
                    part.add(of_side)
                self.progress(sum(of_side.text_bytes for of_side in encoded), total_bytes)
            counts = [sides[0].totals["documents"] for sides in parts]
            if not any(counts):
                raise DataError(
                    f"{files[0].path} and {len(files) - 1} more files hold no text, expected at least one document; "
                    f"found {'; '.join(tally.lines()) or 'none'}"
                )
            if not all(counts):
                raise DataError(
                    f"{files[0].path.parent}: this holdout leaves {counts[0]} documents to train on "
                    f"and {counts[1]} for validation, expected some of both; give another share, or more documents"
                )
            metadata = [list(map(_write_metadata, *sides, tokenizers)) for sides in zip(paths, parts, strict=True)]
            unknown = (_unknown(*side) for sides in parts for side in zip(sides, tokenizers, strict=True))
            return metadata, [line for line in unknown if line]

    def _parts(
        self, documents: Iterable[TextDocument], files: Sequence[TextFile]
    ) -> Iterator[tuple[int, TextDocument]]:
        """Part 0: to train on, part 1: held out."""
        if self.split_at is None:
            yield from ((int(_is_held_out(document, self.holdout)), document) for document in documents)
            return
        if with_prompts := [file.path for file in files if file.has_prompts]:
            raise DataError(
                f"{with_prompts[0]}: found prompts and responses, expected text alone to cut it into training and "
                "validation; hold whole documents out with --holdout"
            )
        for document in documents:
            cut = int(self.split_at * len(document.text))
            halves = enumerate((document.text[:cut], document.text[cut:]))
            yield from ((part, TextDocument(text)) for part, text in halves if text)

    def _encoded(self, batches: Iterator[tuple[int, list[TextDocument]]]) -> Iterator[tuple[int, list[Encoded]]]:
        """The tokenised batches in order, with their parts; at most two per worker are in flight."""
        encode = partial(encode_sides, self.tokenizer_path, self.source_tokenizer_path, bare=self.bare)
        if self.workers == 1:
            yield from ((part, encode(batch)) for part, batch in batches)
            return
        pending: deque[tuple[int, Future[list[Encoded]]]] = deque()
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_ignore_interrupt)
        try:
            for part, batch in batches:
                pending.append((part, pool.submit(encode, batch)))
                if len(pending) >= 2 * self.workers:
                    part, first = pending.popleft()
                    yield part, first.result()
            while pending:
                part, first = pending.popleft()
                yield part, first.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def replacing(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `target` when the block ends; nothing changes if it raises."""
    partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    _restore(replaced, target)  # a killed run may leave it, and the folders removed below
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; choose another output folder, or replace it with --overwrite")
    for left in (partial, replaced):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as error:
        raise StorageError(f"{target} could not be made ({error}); free space or choose another --output") from error
    finally:
        _restore(replaced, target)
        for left in (partial, replaced):
            shutil.rmtree(left, ignore_errors=True)


def _restore(replaced: Path, target: Path) -> None:
    """Restore the old data folder if the new one is missing."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _several_folders(source: Path, files: Sequence[TextFile]) -> Iterator[str]:
    """A note if `source` holds nothing but folders with text: it may be the parent of those that were meant."""
    parts = [file.path.relative_to(source).parts for file in files]
    names = sorted({part[0] for part in parts})
    if len(names) > 1 and all(len(part) > 1 for part in parts):
        shown = f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        yield f"{len(names)} folders ({shown}) became one data folder; for one each: --input {source}/*"


def _is_held_out(document: TextDocument, share: float) -> bool:
    text = f"{document.prompt}\0{document.text}".encode("utf-8", "replace")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def _batched(documents: Iterable[tuple[int, TextDocument]]) -> Iterator[tuple[int, list[TextDocument]]]:
    """(part, its next documents)"""
    batches: list[list[TextDocument]] = [[], []]
    sizes = [0, 0]
    for part, document in documents:
        batches[part].append(document)
        sizes[part] += len(document.text) + len(document.prompt)
        if sizes[part] >= BATCH_CHARACTERS:
            yield part, batches[part]
            batches[part], sizes[part] = [], 0
    yield from ((part, batch) for part, batch in enumerate(batches) if batch)


def _write_metadata(bin_path: Path, part: FolderPart, tokenizer: Tokenizer) -> Metadata:
    size, digest, kind = tokenizer.vocab_size, tokenizer.sha256, tokenizer.kind
    metadata = Metadata(**part.totals, vocab_size=size, tokenizer_sha256=digest, tokenizer_kind=kind)
    with metadata_path(bin_path).open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(metadata), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    return metadata


def _unknown(part: FolderPart, tokenizer: Tokenizer) -> str:
    """Much of it: text of another language than the tokenizer's. '' if there is none."""
    share = part.n_unknown / part.totals["tokens"] if part.totals["tokens"] else 0.0
    return f"{tokenizer.path}: {share:.1%} of the tokens are of unknown text" if part.n_unknown else ""


def _ignore_interrupt() -> None:
    """Worker processes ignore SIGINT: the parent handles Ctrl-C, cancels the tasks and cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
