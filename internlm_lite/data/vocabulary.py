"""Checks before the first batch that data, tokenizer and model have the same vocabulary.

The model's vocabulary may be padded to a multiple of 128. Files without metadata of our tokenizer are checked row by
row when they are read (pack.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from internlm_lite.data.documents import Metadata
from internlm_lite.data.folders import Folder
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError
from internlm_lite.units import round_up

PADDING = 128


def check_vocabulary(folders: Sequence[Folder], vocab_size: int, tokenizer_path: str | None) -> None:
    """Raises DataError naming a file that does not fit `vocab_size` (model.vocab_size) or data.tokenizer."""
    tokenizer = None if tokenizer_path is None else Tokenizer(Path(tokenizer_path))
    if tokenizer is not None:
        _check_size(str(tokenizer.path), tokenizer.vocab_size, vocab_size)
    for folder in folders:
        for file in folder.files:
            if file.metadata is not None:
                _check_file(file.path, file.metadata, vocab_size, tokenizer)


def _check_file(path: Path, metadata: Metadata, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    _check_size(f"{path}: its tokenizer", metadata.vocab_size, vocab_size)
    if metadata.max_token >= vocab_size:
        raise DataError(
            f"{path}: found token id {metadata.max_token}, expected ids below model.vocab_size = {vocab_size}; "
            f"set model.vocab_size, or tokenise the folder again"
        )
    if tokenizer is not None and metadata.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was tokenised with another tokenizer (sha256 {metadata.tokenizer_sha256[:12]}) than "
            f"data.tokenizer {tokenizer.path} (sha256 {tokenizer.sha256[:12]}); "
            f"set data.tokenizer, or tokenise the folder again"
        )


def _check_size(what: str, found: int, vocab_size: int) -> None:
    padded = round_up(found, PADDING)
    if vocab_size not in (found, padded):
        expected = f"{found}" if found == padded else f"{found}, or {padded} (padded)"
        raise DataError(
            f"{what} has a vocabulary of {found}, but model.vocab_size is {vocab_size}; expected {expected}: "
            f"change model.vocab_size or the tokenizer"
        )
