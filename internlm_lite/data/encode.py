"""Tokenises folders of text in several processes; each input folder becomes one data folder of native files.

    IN/code/**/*.py  ->  OUT/code/{code.bin, code.idx, code.meta.json}       document = bos + text + eos

A folder is written to OUT/.code.partial and renamed when it is complete, so that an interrupted run leaves no partial
folder. The folder it replaces is OUT/.code.replaced for a moment; an interrupted run is undone from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from internlm_lite.data.documents import Metadata, metadata_path
from internlm_lite.data.megatron import smallest_dtype, writing
from internlm_lite.data.text import TextDocument, TextFile, find_text, read_documents
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError, StorageError

BATCH_CHARACTERS = 1 << 18
"""Text per task of a worker."""

Encoded = tuple[np.ndarray, np.ndarray, int]
"""Token ids int32 of several documents back to back, their lengths int64, and the bytes of their text."""


def encode_documents(tokenizer_path: Path, documents: Sequence[TextDocument]) -> Encoded:
    """Tokenise documents. Prompts, including bos, become negative ids, see documents.py."""
    tokenizer = _tokenizer(tokenizer_path)
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    eos = [] if tokenizer.eos is None else [tokenizer.eos]
    ids: list[list[int]] = []
    n_bytes = 0
    for document in documents:
        prompt = bos + tokenizer.encode(document.prompt)
        if document.prompt:
            prompt = [-token for token in prompt]
        ids.append(prompt + tokenizer.encode(document.text) + eos)
        n_bytes += len((document.prompt + document.text).encode("utf-8", "replace"))
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    return np.fromiter((token for tokens in ids for token in tokens), np.int32, int(lengths.sum())), lengths, n_bytes


@lru_cache(1)
def _tokenizer(path: Path) -> Tokenizer:
    return Tokenizer(path)  # once per worker process


def encode_folder(
    tokenizer_path: Path,
    source: Path,
    target: Path,
    *,
    workers: int,
    text_key: str = "text",
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> Metadata:
    """Tokenise all text below `source` into the data folder `target`; `progress` gets the bytes of text done.

    Raises DataError on unreadable input, or when `target` exists without `overwrite`; StorageError when writing fails.
    """
    partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
    _restore(replaced, target)  # left by a killed run, as are the folders removed below
    if target.exists() and not overwrite:
        raise DataError(f"{target} exists already; choose another output folder, or replace it with --overwrite")
    files = find_text(source, text_key)
    for left in (partial, replaced):
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        metadata = _write(tokenizer_path, files, partial / f"{target.name}.bin", workers, text_key, progress)
        if target.exists():
            target.rename(replaced)
        partial.rename(target)
    except OSError as error:
        raise StorageError(f"{target} could not be made ({error}); free space or choose another --output") from error
    finally:
        _restore(replaced, target)
        for left in (partial, replaced):
            shutil.rmtree(left, ignore_errors=True)
    return metadata


def _restore(replaced: Path, target: Path) -> None:
    """Restore the old tokens if there are no new ones."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


def _write(
    tokenizer_path: Path,
    files: Sequence[TextFile],
    bin_path: Path,
    workers: int,
    text_key: str,
    progress: Callable[[int], None],
) -> Metadata:
    tokenizer = _tokenizer(tokenizer_path)
    dtype = smallest_dtype(tokenizer.vocab_size, signed=any(file.has_prompts for file in files))
    documents = (document for file in files for document in read_documents(file, text_key))
    totals = dict.fromkeys(("documents", "tokens", "text_bytes", "longest", "max_token"), 0)
    with writing(bin_path, dtype) as writer:
        for tokens, lengths, n_bytes in _encoded(tokenizer_path, _batched(documents), workers):
            writer.add_many(tokens, lengths)
            totals["documents"] += len(lengths)
            totals["tokens"] += len(tokens)
            totals["text_bytes"] += n_bytes
            totals["longest"] = max(totals["longest"], int(lengths.max()))
            totals["max_token"] = max(totals["max_token"], int(np.abs(tokens).max()))
            progress(n_bytes)
        if not totals["documents"]:
            raise DataError(
                f"{files[0].path} and {len(files) - 1} more files hold no text, expected at least one document"
            )
        metadata = Metadata(**totals, vocab_size=tokenizer.vocab_size, tokenizer_sha256=tokenizer.sha256)
        with metadata_path(bin_path).open("w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(metadata), file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    return metadata


def _batched(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) + len(document.prompt)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(tokenizer_path: Path, batches: Iterator[list[TextDocument]], workers: int) -> Iterator[Encoded]:
    """The batches tokenised, in order, at most two per worker in flight."""
    if workers == 1:
        yield from (encode_documents(tokenizer_path, batch) for batch in batches)
        return
    pending: deque[Future[Encoded]] = deque()
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupt)
    try:
        for batch in batches:
            pending.append(pool.submit(encode_documents, tokenizer_path, batch))
            if len(pending) >= 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ignore_interrupt() -> None:
    """Ctrl-C goes to the parent, which cancels the work and cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
