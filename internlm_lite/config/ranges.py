"""The two strings of a config that stand for sets of batches.

skip_batches       "1-3,7"   batches 1, 2, 3 and 7 (ends included)
rampup_batch_size  "2 2 100"           start with 2 micro-batches, add 2 every 100 batches, up to data.micro_num
                   "2 2 1000 tokens"   add 2 with the first batch after each 1000 tokens of the data order
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from internlm_lite.config.plain import shown
from internlm_lite.errors import ConfigError

_MOST_RANGES, _MOST_BATCHES, _MOST_DIGITS = 10_000, 1_000_000, 18
"""Each step looks through the ranges; batches left out are counted through one by one."""


@dataclass(frozen=True)
class Rampup:
    """A growing number of micro-batches per step, a pure function of the batch id."""

    start: int
    increment: int
    every: int
    """Batches, or with `by_tokens` tokens, between increments."""
    by_tokens: bool = False
    borders: tuple[int, ...] = ()
    """With `by_tokens`: ids of the batches with which each increment begins, from `in_batches`."""

    def in_batches(self, full: int, micro_tokens: Sequence[tuple[int, int]]) -> Rampup:
        """This one with its borders. `micro_tokens`: (first batch, tokens of a micro-batch over all ranks) of a stage.
        Tokens of skipped batches count, too: they are part of the order."""
        if not self.by_tokens:
            return self
        borders, batch, tokens, stages = [], 0, 0, list(micro_tokens)
        for level in range(1, (full - self.start) // self.increment + 1):
            size = self.start + self.increment * (level - 1)
            while tokens < level * self.every:
                while len(stages) > 1 and stages[1][0] <= batch:
                    stages.pop(0)
                batches = -(-(level * self.every - tokens) // (size * stages[0][1]))
                if len(stages) > 1:
                    batches = min(batches, stages[1][0] - batch)
                batch, tokens = batch + batches, tokens + batches * size * stages[0][1]
            borders.append(batch)
        return replace(self, borders=tuple(borders))

    def micro_num(self, batch: int, full: int) -> int:
        """Micro-batches of batch `batch` (counted from 0), never more than `full`."""
        level = bisect_right(self.borders, batch) if self.by_tokens else batch // self.every
        return min(full, self.start + self.increment * level)

    def next_border(self, batch: int, full: int) -> int | None:
        """The first batch after `batch` that may have another size; None: all have `full`."""
        if self.micro_num(batch, full) >= full:
            return None
        if self.by_tokens:
            return self.borders[bisect_right(self.borders, batch)]
        return (batch // self.every + 1) * self.every


def parse_skip_batches(text: str) -> tuple[range, ...]:
    """ "1-3,7" -> (range(1, 4), range(7, 8)); "" -> (). Raises ConfigError."""
    parts = text.split(",") if text.strip() else []
    intervals = tuple(_interval(part.strip(), text) for part in parts[: _MOST_RANGES + 1])
    if len(parts) > _MOST_RANGES or sum(interval.stop - interval.start for interval in intervals) > _MOST_BATCHES:
        raise ConfigError(f"found {shown(text)}, expected at most {_MOST_BATCHES} batches in {_MOST_RANGES} ranges")
    return intervals


def _interval(part: str, text: str) -> range:
    first, dash, last = (piece.strip() for piece in part.partition("-"))
    last = last if dash else first
    if not (_is_count(first) and _is_count(last)):
        raise ConfigError(
            f'found {shown(text)}, expected batch ids and inclusive ranges such as "1-3,7"; {shown(part)} is neither'
        )
    if int(first) > int(last):
        raise ConfigError(f'found {shown(text)}, expected ranges that rise; write "{last}-{first}" for {part!r}')
    return range(int(first), int(last) + 1)


def parse_rampup(text: str) -> Rampup | None:
    """ "2 2 100" -> Rampup(2, 2, 100), "2 2 100 tokens" -> the same by tokens; "" -> None. Raises ConfigError."""
    *words, unit = text.split() or [""]
    if unit not in ("", "steps", "tokens"):
        words, unit = [*words, unit], "steps"
    if not words and not unit:
        return None
    if len(words) != 3 or not all(_is_count(word) and int(word) > 0 for word in words):
        raise ConfigError(
            f'found {shown(text)}, expected three integers > 0, "start increment every", such as "2 2 100", and '
            '"tokens" after them where increments are counted in tokens'
        )
    start, increment, every = map(int, words)
    return Rampup(start, increment, every, by_tokens=unit == "tokens")


def _is_count(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= _MOST_DIGITS
