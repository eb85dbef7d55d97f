"""Vocabularies of whole words, as the annotated transformer has: a JSON file with a rule that cuts text into words.

    {"word_rules": "spacy:de", "pieces": ["<s>", "</s>", "<blank>", "<unk>", ".", "Ein", ...]}

plain        words, with hyphens and apostrophes inside, and single signs
spacy:LANG   the rules of spaCy for a language, such as de or en; they need no trained pipeline

Ids: the four marks, then the words that occur often enough, the most frequent first and equally frequent ones by their
characters, as torchtext orders them. Spaces are no words: `decode` puts one between words, but none before a comma.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

from internlm_lite.data.files import write_whole
from internlm_lite.errors import DataError, MissingPackageError

MARKS = ("<s>", "</s>", "<blank>", "<unk>")
PLAIN, SPACY = "plain", "spacy:"
_KEY = "word_rules"
_WORDS = re.compile(r"\w+(?:[-'’]\w+)*|[^\w\s]")
_NO_SPACE = re.compile(r" (?=[.,;:!?)\]}%]|n't\b|['’](?:s|re|ve|ll|d|m)\b)|(?<=[(\[{]) ")

Rules = Callable[[str], list[str]]
"""Text -> its words."""


class WordVocabulary:
    """A `TokenizerModel` of whole words."""

    kind = "words"
    bos: int | None
    eos: int | None
    pad: int | None
    unk: int | None

    def __init__(self, path: Path, data: bytes) -> None:
        found = _read(path, data)
        self._pieces: list[str] = found["pieces"]
        self._ids = {piece: token for token, piece in enumerate(self._pieces) if token >= len(MARKS)}
        self._words = word_rules(found[_KEY], path)
        self.vocab_size = len(self._pieces)
        self.bos, self.eos, self.pad, self.unk = range(len(MARKS))

    def encode(self, text: str) -> list[int]:
        return [self._ids.get(word, MARKS.index("<unk>")) for word in self._words(text)]

    def decode(self, ids: Sequence[int]) -> str:
        words = [self._pieces[token] for token in ids if token not in (self.bos, self.eos, self.pad)]
        return _NO_SPACE.sub("", " ".join(words))

    def piece(self, token: int) -> str:
        return self._pieces[token]


def is_words(data: bytes) -> bool:
    """Whether a file begins as a vocabulary of words."""
    return data[:40].lstrip(b"{ \r\n").startswith(f'"{_KEY}"'.encode())


def default_rules(language: str) -> str:
    """spaCy's where it is installed."""
    return f"{SPACY}{language}" if find_spec("spacy") else PLAIN


def word_rules(name: str, where: object) -> Rules:
    """Raises DataError for an unknown name, MissingPackageError without spaCy. `where`: named in messages."""
    if name == PLAIN:
        return _WORDS.findall
    if not name.startswith(SPACY):
        raise DataError(
            f'{where}: found word rules "{name}", expected "{PLAIN}" or "{SPACY}LANGUAGE", such as spacy:de'
        )
    try:
        import spacy
    except ImportError:
        raise MissingPackageError(f"{where}: {name} needs spaCy: pip install 'internlm_lite[spacy]'") from None
    try:
        cut = spacy.blank(name.removeprefix(SPACY)).tokenizer
    except ImportError as error:  # spaCy's error for a language that it does not know
        raise DataError(f"{where}: {name}: {' '.join(str(error).split())}; give another language") from None
    return lambda text: [word.text for word in cut(text) if not word.is_space]


def train_words(texts: Iterable[str], path: Path, rules: str, min_freq: int, most: int | None) -> None:
    """Write the words of `texts` that occur at least `min_freq` times, the most frequent ones if there are more than
    `most` with the marks. Raises DataError if none does."""
    words, counts = word_rules(rules, "--rules"), Counter[str]()
    for text in texts:
        counts.update(words(text))
    frequent = [word for word, count in counts.items() if count >= min_freq and word not in MARKS]
    kept = sorted(frequent, key=lambda word: (-counts[word], word))[: None if most is None else most - len(MARKS)]
    if not kept:
        raise DataError(
            f"{path}: none of {len(counts)} words occurs {min_freq} times; give more text, or lower --min-freq"
        )
    document = json.dumps({_KEY: rules, "pieces": [*MARKS, *kept]}, ensure_ascii=False, indent=0)
    write_whole(path, document.encode())


def _read(path: Path, data: bytes) -> dict:
    try:
        found = json.loads(data)
        pieces = found["pieces"]
        texts = all(isinstance(piece, str) for piece in (*pieces, found[_KEY]))
        if texts and tuple(pieces[: len(MARKS)]) == MARKS:
            return found
        why = f"found no list of words that begins with {' '.join(MARKS)}"
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = f"found damage ({type(error).__name__}: {error})"
    raise DataError(f"tokenizer {path}: {why}; make it again with tools/tokenizer.py train --words")
