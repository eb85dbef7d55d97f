"""Ranks of byte pairs in tiktoken's form: a line of base64 bytes and a rank for each token.

Such a file has neither the pattern that cuts a text before pairs are merged, nor special tokens: the number of its
ranks tells which of the published ones it is.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internlm_lite.errors import DataError

_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?(\n|$)")
_CUTS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_THREE, _BY_ONE = _CUTS % r"\p{N}{1,3}", _CUTS % r"\p{N}"
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARKS, _CASES = r"\p{Lm}\p{Lo}\p{M}", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}]*[\p{{Ll}}{_MARKS}]+{_CASES}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_MARKS}]+[\p{{Ll}}{_MARKS}]*{_CASES}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)


@dataclass(frozen=True)
class Published:
    """What belongs to the ranks of one published tokenizer."""

    name: str
    pattern: str
    special: dict[str, int]
    bos: str | None = None


_END = "<|endoftext|>"
_LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(254)))
PUBLISHED = {
    50256: Published("gpt2", _GPT2, {_END: 50256}),
    100256: Published("cl100k", _BY_THREE, {_END: 100257}),
    128000: Published("llama3", _BY_THREE, {name: 128000 + n for n, name in enumerate(_LLAMA3)}, _LLAMA3[0]),
    151643: Published("qwen", _BY_ONE, {_END: 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
    199998: Published("o200k", _O200K, {_END: 199999}),
}
"""Number of ranks -> tokenizer. Sources: tiktoken's openai_public.py; the tokenizers of Llama 3 and Qwen."""


def is_ranks(data: bytes) -> bool:
    """Whether a file that begins with `data` is one of ranks."""
    return _LINE.match(data) is not None


class TiktokenRanks:
    """A `TokenizerModel` of a .tiktoken file."""

    kind = "tiktoken"

    def __init__(self, path: Path, data: bytes) -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError(
                f"tokenizer {path} needs the package tiktoken: pip install 'internlm_lite[tiktoken]'"
            ) from None
        ranks = _ranks(path, data)
        published = PUBLISHED.get(len(ranks))
        if published is None:
            known = ", ".join(f"{n} ({one.name})" for n, one in PUBLISHED.items())
            raise DataError(
                f"tokenizer {path}: found {len(ranks)} ranks, expected one of {known}; for another one give its "
                "tokenizer.json, which also has the pattern and the special tokens"
            )
        special = published.special
        self._encoding: Any = tiktoken.Encoding(
            published.name, pat_str=published.pattern, mergeable_ranks=ranks, special_tokens=special
        )
        self._special = {token: name for name, token in special.items()}
        self.vocab_size = max(*ranks.values(), *special.values()) + 1
        self.bos = None if published.bos is None else special[published.bos]
        self.eos: int | None = special[_END if _END in special else _LLAMA3[1]]
        self.pad: int | None = None
        self.unk: int | None = None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._encoding.encode_ordinary(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        known = (token for token in ids if token not in self._special)
        return b"".join(map(self._bytes, known)).decode("utf-8", "replace")

    def piece(self, token: int) -> str:
        return self._special.get(token) or self._bytes(token).decode("utf-8", "replace")

    def _bytes(self, token: int) -> bytes:
        try:
            found: bytes = self._encoding.decode_single_token_bytes(token)
        except KeyError:  # ids between ranks and special tokens
            found = b""
        return found


def _ranks(path: Path, data: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split() if line else (b"", b"-1")
            if line:
                ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"tokenizer {path}, line {number}: found {line[:40]!r}, expected base64 bytes and a rank"
            ) from None
    return ranks
