"""Checks before the first batch that data, tokenizer and model have the same vocabulary.

The model may have more rows than the tokenizer has pieces. Files without metadata of our tokenizer are checked row by
row when they are read (pack.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from internlm_lite.data.documents import Metadata
from internlm_lite.data.folders import Folder
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError
from internlm_lite.units import round_up

logger = logging.getLogger("internlm_lite")

PADDING = 128
"""Padding to a multiple of it is usual and not worth a warning."""


def check_vocabulary(folders: Sequence[Folder], vocab_size: int, tokenizer_path: str | None, *, log: bool) -> None:
    """Raises DataError naming a file that does not fit `vocab_size` (model.vocab_size) or data.tokenizer.

    `log`: warn once if the model has more rows than padding explains.
    """
    tokenizer = None if tokenizer_path is None else Tokenizer(Path(tokenizer_path))
    found = {}
    if tokenizer is not None:
        _check_size(str(tokenizer.path), tokenizer.vocab_size, vocab_size)
        found[tokenizer.vocab_size] = str(tokenizer.path)
    for folder in folders:
        for file in folder.files:
            if file.metadata is not None:
                _check_file(file.path, file.metadata, vocab_size, tokenizer)
                found.setdefault(file.metadata.vocab_size, f"the tokenizer of {file.path}")
    if log and found and round_up(max(found), PADDING) < vocab_size:
        text = (
            "model.vocab_size=%d: %s has %d pieces, so the last %d rows of embedding and head are trained on no token"
        )
        logger.warning(text, vocab_size, found[max(found)], max(found), vocab_size - max(found))


def _check_file(path: Path, metadata: Metadata, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    _check_size(f"{path}: its tokenizer", metadata.vocab_size, vocab_size)
    if metadata.max_token >= vocab_size:
        raise DataError(
            f"{path}: found token id {metadata.max_token}, expected ids below model.vocab_size = {vocab_size}; "
            f"set model.vocab_size, or tokenise the folder again"
        )
    if tokenizer is not None and metadata.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was tokenised with another tokenizer "
            f"({metadata.tokenizer_kind}, sha256 {metadata.tokenizer_sha256[:12]}) than "
            f"data.tokenizer {tokenizer.path} ({tokenizer.kind}, sha256 {tokenizer.sha256[:12]}); "
            f"set data.tokenizer, or tokenise the folder again"
        )


def _check_size(what: str, found: int, vocab_size: int) -> None:
    if vocab_size < found:
        raise DataError(
            f"{what} has a vocabulary of {found}, but model.vocab_size is {vocab_size}; expected at least {found}, "
            f"such as {round_up(found, PADDING)}: change model.vocab_size or the tokenizer"
        )
