"""Text <-> token ids, by the tokenizer file that a user has.

    tokenizer.model              sentencepiece (sentencepiece_model.py)
    tokenizer.json               Hugging Face's tokenizers (json_tokenizer.py)
    vocab.json + merges.txt      GPT-2's byte-pair encoding; also encoder.json + vocab.bpe
    NAME.tiktoken                ranks of byte pairs (tiktoken_ranks.py); Llama 3 calls this one tokenizer.model, too
    NAME.json                    whole words (word_vocabulary.py)

What a file is follows from its first bytes. A folder stands for the first of these files in it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from internlm_lite.data.files import kind_of
from internlm_lite.data.json_tokenizer import JsonTokenizer, byte_pairs
from internlm_lite.data.sentencepiece_model import SentencePieceModel, train_sentencepiece
from internlm_lite.data.tiktoken_ranks import TiktokenRanks, is_ranks
from internlm_lite.data.word_vocabulary import WordVocabulary, is_words
from internlm_lite.errors import DataError

MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""A vocabulary of GPT-2's form -> the file beside it with its merges."""
NAMES = ("tokenizer.json", "tokenizer.model", *MERGES)
"""Files looked for in a folder, in this order."""


class TokenizerModel(Protocol):
    """What the formats have in common."""

    kind: str
    vocab_size: int
    """All ids are below it."""
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, which has no lone surrogates; what looks like a special token in it is ordinary text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, all below `vocab_size`; special tokens are skipped."""

    def piece(self, token: int) -> str:
        """The tokenizer's own name of one token."""


class Tokenizer:
    """Text <-> token ids. Raises DataError when `path` is missing or no tokenizer."""

    def __init__(self, path: Path) -> None:
        self.path = _in_folder(path)
        """The file; where a folder was given, the one in it."""
        data = _read(self.path)
        self.model: TokenizerModel = _format(self.path, data)(self.path, data)
        self.kind = self.model.kind
        """Format of the file."""
        merges = MERGES.get(self.path.name)
        self.files = {self.path.name: data} | ({merges: _read(self.path.with_name(merges))} if merges else {})
        """The files of the tokenizer, to be copied as they are."""
        self.sha256 = hashlib.sha256(b"".join(self.files.values())).hexdigest()
        self.vocab_size = self.model.vocab_size
        self.bos = self.model.bos
        """Token at the start of a document; None: this tokenizer puts none there."""
        self.eos = self.model.eos
        """Token at the end of a document; None: the model has none."""
        self.pad = self.model.pad
        """Padding token; None: the model has none."""
        self.unk = self.model.unk
        """Token for unknown text; None: there is none."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without bos or eos. A lone surrogate becomes '?'."""
        return self.model.encode(text.encode("utf-8", "replace").decode())

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; bos, eos, padding, and ids beyond the tokenizer's vocabulary are skipped."""
        return self.model.decode([int(token) for token in ids if token < self.vocab_size])

    def piece(self, token: int) -> str:
        """The tokenizer's own name of one token id."""
        return self.model.piece(int(token))


def train_tokenizer(texts: Iterable[str], path: Path, vocab_size: int, threads: int) -> Tokenizer:
    """Train a sentencepiece model of byte pairs on `texts` and write it to `path`; raises as `train_sentencepiece`."""
    train_sentencepiece(texts, path, vocab_size, threads)
    return Tokenizer(path)


def _in_folder(path: Path) -> Path:
    if kind_of(path) != "a folder":
        return path
    found = next((path / name for name in NAMES if (path / name).exists()), None)
    if found is None:
        raise DataError(f"tokenizer {path}: found none of {', '.join(NAMES)} in this folder; give the tokenizer's file")
    return found


def _read(path: Path) -> bytes:
    try:
        if (kind := kind_of(path)) != "a file":  # a FIFO blocks, a device may never end
            raise DataError(
                f"tokenizer {path} is {kind}, expected a sentencepiece model, a tokenizer.json, vocab.json beside "
                "merges.txt, a .tiktoken file or a vocabulary of words; correct the path, or make one with "
                "tools/tokenizer.py train"
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror}; correct the path or its permissions") from None


def _format(path: Path, data: bytes) -> Callable[[Path, bytes], TokenizerModel]:
    if path.name in MERGES:
        return lambda path, data: byte_pairs(path, data, _read(path.with_name(MERGES[path.name])))
    if is_words(data):
        return WordVocabulary
    if data.lstrip()[:1] == b"{":
        return JsonTokenizer
    return TiktokenRanks if is_ranks(data) else SentencePieceModel
