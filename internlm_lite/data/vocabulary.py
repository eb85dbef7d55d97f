"""Checks before the first batch that data, tokenizer and model have the same vocabulary.

The model may have more rows than the tokenizer has pieces. Files without metadata of our tokenizer are checked row by
row when they are read (pack.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.data.documents import Documents, Metadata
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import DataError
from internlm_lite.units import round_up

logger = logging.getLogger("internlm_lite")

PADDING = 128
"""Padding to a multiple of it is usual and not worth a warning."""


@dataclass(frozen=True)
class VocabularySide:
    """What the files of one side of the data must fit. `VocabularySide("source_", ...)`: the sources of pairs."""

    prefix: str
    """Of the keys model.vocab_size and data.tokenizer."""
    vocab_size: int
    tokenizer: str | None

    @property
    def size_key(self) -> str:
        return f"model.{self.prefix}vocab_size"


def check_vocabulary(files: Sequence[Documents], side: VocabularySide, *, log: bool) -> None:
    """Raises DataError naming a file that does not fit the side's vocab_size or tokenizer.

    `log`: warn once if the model has more rows than padding explains.
    """
    tokenizer = None if side.tokenizer is None else Tokenizer(Path(side.tokenizer))
    found = {}
    if tokenizer is not None:
        _check_size(str(tokenizer.path), tokenizer.vocab_size, side)
        found[tokenizer.vocab_size] = str(tokenizer.path)
    for file in files:
        if file.metadata is not None:
            _check_file(file.path, file.metadata, side, tokenizer)
            found.setdefault(file.metadata.vocab_size, f"the tokenizer of {file.path}")
    if log and found and round_up(max(found), PADDING) < side.vocab_size:
        text = "%s=%d: %s has %d pieces, so the last %d rows of embedding and head are trained on no token"
        most = max(found)
        logger.warning(text, side.size_key, side.vocab_size, found[most], most, side.vocab_size - most)


def _check_file(path: Path, metadata: Metadata, side: VocabularySide, tokenizer: Tokenizer | None) -> None:
    _check_size(f"{path}: its tokenizer", metadata.vocab_size, side)
    if metadata.max_token >= side.vocab_size:
        raise DataError(
            f"{path}: found token id {metadata.max_token}, expected ids below {side.size_key} = {side.vocab_size}; "
            f"set {side.size_key}, or tokenise the folder again"
        )
    if tokenizer is not None and metadata.tokenizer_sha256 != tokenizer.sha256:
        raise DataError(
            f"{path} was tokenised with another tokenizer "
            f"({metadata.tokenizer_kind}, sha256 {metadata.tokenizer_sha256[:12]}) than "
            f"data.{side.prefix}tokenizer {tokenizer.path} ({tokenizer.kind}, sha256 {tokenizer.sha256[:12]}); "
            f"set data.{side.prefix}tokenizer, or tokenise the folder again"
        )


def _check_size(what: str, found: int, side: VocabularySide) -> None:
    if side.vocab_size < found:
        raise DataError(
            f"{what} has a vocabulary of {found}, but {side.size_key} is {side.vocab_size}; expected at least {found}, "
            f"such as {round_up(found, PADDING)}: change {side.size_key} or the tokenizer"
        )
