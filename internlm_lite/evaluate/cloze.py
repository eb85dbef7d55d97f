"""Built-in tasks made of the validation text: nothing is downloaded, and the same text gives the same questions.

cloze_word        the last word of a sentence, among 4 words of the same text         acc, acc_norm, acc_bytes
cloze_greedy      the same words: is it what greedy decoding gives (LAMBADA)?         acc, perplexity
cloze_sentence    which of 4 sentences of the same text comes next                   acc, acc_norm, acc_bytes

acc: the likeliest continuation is the right one. acc_norm divides log-likelihoods by characters, as lm_eval does, and
acc_bytes by UTF-8 bytes. Choices are taken by a hash of their text: no generator, no order of files decides.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from internlm_lite.evaluate.answers import Answers

HIGHER_IS_BETTER = {
    "cloze_word": {"acc": True, "acc_norm": True, "acc_bytes": True},
    "cloze_greedy": {"acc": True, "perplexity": False},
    "cloze_sentence": {"acc": True, "acc_norm": True, "acc_bytes": True},
}
"""Task -> metric -> whether more is better."""
BUILT_IN = tuple(HIGHER_IS_BETTER)
DEFAULT_LIMIT = 200
"""Questions of a task, if there are as many."""
CHOICES = 4
_CONTEXT = 800
"""Most characters of context."""
_SHORTEST_CONTEXT = 40
_SENTENCE = re.compile(r"[^\n.!?。！？]+[.!?。！？]*[ \t]*\n*")
_LAST_WORD = re.compile(r"(?P<word>\w+)[^\w]*\Z")
_LONGEST_WORD = 20
_PER_TEXT = 8
"""Most questions of one text, so that many texts are asked about."""


@dataclass(frozen=True)
class Question:
    """`choices`: what may follow the context; the first is right."""

    context: str
    choices: tuple[str, ...]


def make_questions(task: str, texts: Iterable[str], limit: int) -> list[Question]:
    """At most `limit` questions of a built-in task; fewer where the texts do not give as many."""
    make = _next_sentences if task == "cloze_sentence" else _last_words
    found: list[Question] = []
    for text in texts:
        asked = sorted(make(text), key=lambda question: _rank(question.context, question.choices[0]))
        found += asked[:_PER_TEXT]
        if len(found) >= limit:
            break
    return found[:limit]


def _last_words(text: str) -> Iterator[Question]:
    """The space before the word is its own, as tokenizers have it. In writing without spaces, where a word cannot be
    told, the last two characters are asked for."""
    found = [(*_border(text, start, stop), start) for start, stop in _sentences(text)]
    words = sorted({text[start:stop] for start, stop, begin in found if start > begin})
    for start, stop, begin in found:
        word = text[start:stop]
        others = [
            other for other in words if other.strip() != word.strip() and other[:1].isspace() == word[:1].isspace()
        ]
        context = text[max(0, start - _CONTEXT) : start]
        if start > begin and len(others) >= CHOICES - 1 and len(context) >= _SHORTEST_CONTEXT:
            yield Question(context, (word, *_drawn(context, others)))


def _border(text: str, start: int, stop: int) -> tuple[int, int]:
    """Start and end of a sentence's last word with its space; an empty range if it has none that can be told."""
    match = _LAST_WORD.search(text, start, stop)
    if match is None or len(match["word"]) < 2:
        return start, start
    first, last = match.span("word")
    if not match["word"].isascii() and (first == start or last - first > _LONGEST_WORD):
        first = last - 2
    if last - first > _LONGEST_WORD:
        return start, start
    if first > start and text[first - 1] == " ":
        first -= 1
    return first, last


def _next_sentences(text: str) -> Iterator[Question]:
    spans = [span for span in _sentences(text) if span[1] - span[0] >= 10]
    pieces = sorted({text[start:stop].rstrip() for start, stop in spans})
    for start, stop in spans:
        piece, context = text[start:stop].rstrip(), text[max(0, start - _CONTEXT) : start]
        others = [other for other in pieces if other != piece]
        if len(others) >= CHOICES - 1 and len(context) >= _SHORTEST_CONTEXT:
            yield Question(context, (piece, *_drawn(context, others)))


def _sentences(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _SENTENCE.finditer(text))


def _drawn(context: str, others: Sequence[str]) -> list[str]:
    return sorted(others, key=lambda other: _rank(context, other))[: CHOICES - 1]


def _rank(context: str, choice: str) -> bytes:
    return hashlib.blake2b(f"{context}\0{choice}".encode("utf-8", "replace"), digest_size=8).digest()


def scores_of(task: str, questions: Sequence[Question], answers: Answers) -> dict[str, float]:
    """Metric -> value of a built-in task. `questions`: at least one."""
    if task == "cloze_greedy":
        found = answers.log_likelihoods([(question.context, question.choices[0]) for question in questions])
        mean = sum(total for total, _ in found) / len(found)
        perplexity = math.exp(-mean) if -mean < 700 else math.inf
        return {"acc": sum(greedy for _, greedy in found) / len(found), "perplexity": perplexity}
    pairs = [(question.context, choice) for question in questions for choice in question.choices]
    totals = iter([total for total, _ in answers.log_likelihoods(pairs)])
    right = dict.fromkeys(("acc", "acc_norm", "acc_bytes"), 0)
    for question in questions:
        of_choices = [next(totals) for _ in question.choices]
        sizes = {
            "acc": [1] * len(of_choices),
            "acc_norm": [len(choice) for choice in question.choices],
            "acc_bytes": [len(choice.encode("utf-8", "replace")) for choice in question.choices],
        }
        for name, by in sizes.items():
            means = [total / size for total, size in zip(of_choices, by, strict=True)]
            right[name] += means.index(max(means)) == 0
    return {name: count / len(questions) for name, count in right.items()}
