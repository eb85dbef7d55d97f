"""Sentencepiece models, and training a new one.

Byte-pair encoding of unchanged text (no normalisation, no added space), with bytes as the fallback:
decode(encode(text)) == text for every text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from internlm_lite.data.files import write_whole
from internlm_lite.errors import DataError, InternLMError

SPACE_MARK = "\u2581"
"""sentencepiece writes a space as this character, so the character itself is encoded as its bytes."""
LONGEST_SENTENCE_BYTES = 4000
"""Longest piece of training text; sentencepiece drops sentences longer than 4192."""


class SentencePieceModel:
    """A `TokenizerModel` of a sentencepiece file."""

    kind = "sentencepiece"

    def __init__(self, path: Path, data: bytes) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, UnicodeDecodeError):  # of a message about damaged pieces
            raise DataError(
                f"tokenizer {path}: found no sentencepiece model, tokenizer.json or .tiktoken file; give one of these"
            ) from None
        self.vocab_size: int = self._processor.vocab_size()
        self.bos: int | None = _or_none(self._processor.bos_id())
        self.eos: int | None = _or_none(self._processor.eos_id())
        self.pad: int | None = _or_none(self._processor.pad_id())
        self.unk: int | None = self._processor.unk_id()
        self.adds_space: bool = "".join(self._processor.encode("a", out_type=str)).startswith(SPACE_MARK)
        """Whether the model adds a space before the text."""
        self._mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        if self._processor.unk_id() in self._mark_ids:  # a model without byte fallback
            self._mark_ids = [self._processor.unk_id()]

    def encode(self, text: str) -> list[int]:
        parts = text.split(SPACE_MARK)
        ids: list[int] = self._processor.encode(parts[0])
        for part in parts[1:]:
            ids += self._mark_ids + self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text

    def piece(self, token: int) -> str:
        piece: str = self._processor.id_to_piece(token)
        return piece

    def score(self, token: int) -> float:
        """Pairs of pieces with a higher score are merged first."""
        score: float = self._processor.get_score(token)
        return score


def _or_none(token: int) -> int | None:
    return token if token >= 0 else None


def _what_to_change(error: str) -> str:
    """Its message names a line of its source, and an option that --vocab-size stands for here."""
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", error):
        return f"expected at least {found[1]}, for every byte and the text's characters; raise --vocab-size"
    if found := re.search(r"size too high .* <= (\d+)", error):
        return f"expected at most {found[1]} for a text as small as this; lower --vocab-size, or give more text"
    return error.strip()


def train_sentencepiece(texts: Iterable[str], path: Path, vocab_size: int, threads: int) -> None:
    """Train byte-pair encoding on `texts` and write it to `path` atomically.

    Ids 0..3 are <unk> <s> </s> <pad>, then the 256 bytes. Raises DataError when `vocab_size` is too large for the text,
    or too small for its characters.
    """
    model = io.BytesIO()
    faults: list[InternLMError] = []

    def sentences() -> Iterator[str]:
        try:
            yield from (cut for text in texts for cut in _sentences(text))
        except InternLMError as error:  # sentencepiece would replace the message
            faults.append(error)

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        if faults:
            raise faults[0] from None
        reason = _what_to_change(str(error))
        raise DataError(f"sentencepiece could not train a vocabulary of {vocab_size}: {reason}") from None
    if faults:
        raise faults[0]
    write_whole(path, model.getvalue())


def _sentences(text: str) -> Iterator[str]:
    """Split text into groups of whole lines, so that line breaks and indentation become pieces; cuts long lines."""
    group: list[str] = []
    size = 0
    for line in text.encode("utf-8", "replace").decode().splitlines(keepends=True):
        n_bytes = len(line.encode())
        if size + n_bytes > LONGEST_SENTENCE_BYTES and group:
            yield "".join(group)
            group, size = [], 0
        if n_bytes > LONGEST_SENTENCE_BYTES:
            width = LONGEST_SENTENCE_BYTES // 4  # characters of at most 4 bytes
            yield from (line[i : i + width] for i in range(0, len(line), width))
        else:
            group.append(line)
            size += n_bytes
    if group:
        yield "".join(group)
