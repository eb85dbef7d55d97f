"""What is asked for, what has come of it, and when a continuation ends."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internlm_lite.errors import ConfigError

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text, as `Tokenizer.decode`."""
BROKEN = "\ufffd"
"""Decoders write this for bytes that are no character, also for the first bytes of one whose others are to come."""


@dataclass(frozen=True)
class Request:
    """One prompt, and how far to continue it. Raises ConfigError when a value cannot be."""

    prompt: Sequence[int]
    max_new_tokens: int
    stop_ids: frozenset[int] = frozenset()
    """A continuation ends before any of these tokens."""
    stop_strings: tuple[str, ...] = ()
    """A continuation ends before any of these texts, however tokens divide them."""
    seed: int = 0
    """Decides what is drawn, whatever is generated beside it."""
    source: Sequence[int] = ()
    """What the encoder of an encoder-decoder reads; the prompt then begins the target."""

    def __post_init__(self) -> None:
        problems = []
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens {self.max_new_tokens}: expected 0 or more")
        if isinstance(self.stop_strings, str) or not all(isinstance(s, str) and s for s in self.stop_strings):
            problems.append(f"stop_strings {self.stop_strings!r}: expected a tuple of texts, none of them empty")
        if not all(type(token) is int and token >= 0 for token in self.stop_ids):
            problems.append(f"stop_ids {sorted(self.stop_ids, key=str)}: expected token ids, 0 or more")
        if not -(2**63) <= self.seed < 2**63:
            problems.append(f"seed {self.seed}: expected a whole number of 64 bits")
        if problems:
            raise ConfigError("\n".join(problems))


@dataclass
class Continuation:
    """What follows a prompt. `text`: "" without a decoder."""

    tokens: list[int]
    """Without the stop token; those of a stop string are included."""
    text: str
    """Ends before a stop string."""
    ended_by: str
    """"stop": a stop token or string; "length": as many tokens as were asked for."""
    score: float | None = None
    """Of a beam search: sum of log-probabilities / length ** length_penalty."""


class TextStream:
    """The text of tokens that come one by one, in pieces that will not change: none ends inside a character, or inside
    what may become a stop string."""

    def __init__(self, decode: Decode, prompt: Sequence[int], stop_strings: Sequence[str]) -> None:
        self._decode, self._stop_strings = decode, stop_strings
        self._window, self._told = list(prompt), len(prompt)  # the last tokens, and how many of them are in the text
        self._held = ""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece that this token completes, which may be empty."""
        self._window.append(token)
        new = self._untold()
        if not new or new.endswith(BROKEN):
            return ""
        # Tokens are decoded behind earlier ones, because tokenizers write the first of a text without its space.
        self._window, self._told = self._window[self._told :], len(self._window) - self._told
        return self._release(new)

    def finish(self) -> str:
        """What was held back."""
        piece = "" if self.stopped else self._release(self._untold())
        rest, self._held = self._held, ""
        self.text += rest
        return piece + rest

    def _untold(self) -> str:
        return self._decode(self._window)[len(self._decode(self._window[: self._told])) :]

    def _release(self, new: str) -> str:
        held = self._held + new
        ends = [(at + len(stop), at) for stop in self._stop_strings if (at := held.find(stop)) >= 0]
        self.stopped = bool(ends)
        # The stop string that is complete first counts, as if characters came one by one.
        size = min(ends)[1] if ends else len(held) - max((_overlap(held, s) for s in self._stop_strings), default=0)
        self._held = "" if ends else held[size:]
        self.text += held[:size]
        return held[:size]

    def fork(self) -> TextStream:
        other = copy.copy(self)
        other._window = list(self._window)
        return other


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


class Growing:
    """A continuation that grows token by token until `ended_by` is set."""

    def __init__(self, request: Request, decode: Decode | None) -> None:
        self.request, self.tokens, self.length, self.ended_by = request, list[int](), 0, ""
        self._stream = None if decode is None else TextStream(decode, request.prompt, request.stop_strings)

    def add(self, token: int) -> str:
        """The text that is certain now."""
        self.length += 1
        piece = ""
        if token in self.request.stop_ids:
            self.ended_by = "stop"
        else:
            self.tokens.append(token)
            piece = "" if self._stream is None else self._stream.add(token)
            if self._stream is not None and self._stream.stopped:
                self.ended_by = "stop"
            elif self.length >= self.request.max_new_tokens:
                self.ended_by = "length"
        if self.ended_by and self._stream is not None:
            piece += self._stream.finish()
            if self._stream.stopped:
                self.ended_by = "stop"
        return piece

    def fork(self) -> Growing:
        other = copy.copy(self)
        other.tokens, other._stream = list(self.tokens), self._stream and self._stream.fork()
        return other

    def result(self, score: float | None = None) -> Continuation:
        text = "" if self._stream is None else self._stream.text
        return Continuation(self.tokens, text, self.ended_by or "length", score)
