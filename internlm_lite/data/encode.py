"""Tokenises folders of text in several processes; each input folder becomes one data folder of native files.

    IN/code/**/*.py  ->  OUT/code/{code.bin, code.idx, code.meta.json}       document = bos + text + eos

A folder is written to OUT/.code.partial and renamed when it is complete, so that an interrupted run leaves no partial
folder. While it is replaced, the old folder is OUT/.code.replaced; the next run restores it after an interruption.
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
from dataclasses import dataclass
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
"""Characters of text per task of a worker process."""

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


@dataclass(frozen=True)
class FolderEncoder:
    """Tokenises folders of text."""

    tokenizer_path: Path
    workers: int = 1
    """Number of worker processes."""
    text_key: str = "text"
    progress: Callable[[int], None] = lambda n_bytes: None
    """Progress callback: called with the bytes of text encoded since its last call."""

    def encode(self, source: Path, target: Path, *, overwrite: bool = False) -> Metadata:
        """Tokenise all text below `source` into the data folder `target`.

        Raises DataError on unreadable input, or when `target` exists without `overwrite`; StorageError when writing
        fails.
        """
        partial, replaced = (target.with_name(f".{target.name}.{state}") for state in ("partial", "replaced"))
        _restore(replaced, target)  # a killed run may leave it, and the folders removed below
        if target.exists() and not overwrite:
            raise DataError(f"{target} exists already; choose another output folder, or replace it with --overwrite")
        files = find_text(source, self.text_key)
        for left in (partial, replaced):
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            metadata = self._write(files, partial / f"{target.name}.bin")
            if target.exists():
                target.rename(replaced)
            partial.rename(target)
        except OSError as error:
            raise StorageError(
                f"{target} could not be made ({error}); free space or choose another --output"
            ) from error
        finally:
            _restore(replaced, target)
            for left in (partial, replaced):
                shutil.rmtree(left, ignore_errors=True)
        return metadata

    def _write(self, files: Sequence[TextFile], bin_path: Path) -> Metadata:
        tokenizer = _tokenizer(self.tokenizer_path)
        dtype = smallest_dtype(tokenizer.vocab_size, signed=any(file.has_prompts for file in files))
        documents = (document for file in files for document in read_documents(file, self.text_key))
        totals = dict.fromkeys(("documents", "tokens", "text_bytes", "longest", "max_token"), 0)
        with writing(bin_path, dtype) as writer:
            for tokens, lengths, n_bytes in self._encoded(_batched(documents)):
                writer.add_many(tokens, lengths)
                totals["documents"] += len(lengths)
                totals["tokens"] += len(tokens)
                totals["text_bytes"] += n_bytes
                totals["longest"] = max(totals["longest"], int(lengths.max()))
                totals["max_token"] = max(totals["max_token"], int(np.abs(tokens).max()))
                self.progress(n_bytes)
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

    def _encoded(self, batches: Iterator[list[TextDocument]]) -> Iterator[Encoded]:
        """The tokenised batches in order; at most two per worker are in flight."""
        if self.workers == 1:
            yield from (encode_documents(self.tokenizer_path, batch) for batch in batches)
            return
        pending: deque[Future[Encoded]] = deque()
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), initializer=_ignore_interrupt)
        try:
            for batch in batches:
                pending.append(pool.submit(encode_documents, self.tokenizer_path, batch))
                if len(pending) >= 2 * self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _restore(replaced: Path, target: Path) -> None:
    """Restore the old data folder if the new one is missing."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)


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


def _ignore_interrupt() -> None:
    """Worker processes ignore SIGINT: the parent handles Ctrl-C, cancels the tasks and cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
