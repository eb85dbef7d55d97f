"""The interface of tokenised files, and the metadata that our tokenizer writes beside them.

    name.bin, name.idx         native, the indexed format of Megatron-LM (megatron.py)
    name.bin, name.bin.meta    InternLM's JSON lines (internlm.py)
    name.meta.json             Metadata, optional, beside either

A negative token is a prompt token: its id is the absolute value, and it is never a label. Id 0 has no negative, so it
is a label in a prompt too; it is usually `<unk>`, which our tokenizers never produce.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import TypeAdapter, ValidationError

from internlm_lite.data.files import require_file
from internlm_lite.errors import DataError

LONGEST_METADATA = 1 << 16
"""Bytes read of a metadata file."""


class EmptyFileError(DataError):
    """A tokenised file is whole and holds no token, as of a shard that had no text."""


@dataclass(frozen=True)
class Metadata:
    """Written by `tools/tokenizer.py encode` beside the tokens, checked when the file is opened."""

    documents: int
    tokens: int
    text_bytes: int
    longest: int
    """Number of tokens of the longest document."""
    max_token: int
    """Largest token id."""
    vocab_size: int
    """Number of token ids of the tokenizer."""
    tokenizer_sha256: str
    tokenizer_kind: str = "sentencepiece"
    """Format of the tokenizer's file."""
    label_bytes: int | None = None
    """UTF-8 bytes of the text that is learnt: text_bytes without prompts. None: written by an older version."""
    labels: int | None = None
    """Tokens that are labels where documents are whole: all but the first of each and those of prompts."""


class Documents(Protocol):
    """The documents of one file, in file order."""

    @property
    def path(self) -> Path:
        """The file, for messages."""

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each document."""

    @property
    def metadata(self) -> Metadata | None: ...

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        """[stop - start] of any integer dtype: tokens start..stop of a document, 0 <= start <= stop <= its length."""

    def digest(self) -> str:
        """Hash that changes when documents are added, removed, or change length."""


def metadata_path(bin_path: Path) -> Path:
    """x/name.bin -> x/name.meta.json"""
    return bin_path.with_suffix(".meta.json")


def read_metadata(bin_path: Path) -> Metadata | None:
    """The metadata of a tokenised file; None if it has no such file. Raises DataError when it cannot be parsed."""
    path = metadata_path(bin_path)
    if not path.exists():
        return None
    require_file(path)
    try:
        with path.open("rb") as file:
            return TypeAdapter(Metadata).validate_json(file.read(LONGEST_METADATA), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        keys = ", ".join(field.name for field in dataclasses.fields(Metadata))
        raise DataError(
            f"{path}: found damaged metadata ({' '.join(map(str, first['loc']))}: {first['msg']}), expected a JSON "
            f"object with {keys}; tokenise the folder again, or delete this file to train without its checks"
        ) from None
