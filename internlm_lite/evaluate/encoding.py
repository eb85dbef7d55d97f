"""Texts of a task as token ids: which are fed, which are scored. Pure functions of a tokenizer and a length, with the
conventions of lm-evaluation-harness (`lm_eval/api/model.py`, `lm_eval/utils.py`) but for BOS, which stands once at the
start of every text, as in the documents that the model is trained on.

    ids fed      BOS  a   b | c   d        context BOS a b, continuation c d e
    ids scored            c | d   e        the last 3 positions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from internlm_lite.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Window:
    """Ids to feed, and the ids that are scored at the last positions, one for each of them."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]


class TextEncoder:
    """Encodes texts for a model that reads at most `max_length` tokens."""

    def __init__(self, tokenizer: Tokenizer, max_length: int) -> None:
        self._encode, self._max = tokenizer.encode, max_length
        self._bos = [] if tokenizer.bos is None else [tokenizer.bos]
        first = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
        self._prefix = [] if first is None else [first]
        """Stands before a text without context: BOS, else EOS. Without both, the first token is not scored."""

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the context and of the continuation, encoded together and cut behind those of the context.

        Spaces at the end of the context go to the continuation. Where a token spans the border and nothing is left of
        the continuation, it is encoded alone."""
        if not context:
            return self._prefix, self._encode(continuation)
        kept = context.rstrip()
        continuation = context[len(kept) :] + continuation
        ids = self._encode(kept) if kept else []
        scored = self._encode(kept + continuation)[len(ids) :]
        if continuation and not scored:
            scored = self._encode(continuation)
        return (self._bos + ids) or self._prefix, scored

    def windows(self, context: str, continuation: str) -> list[Window]:
        """What to score of a continuation: a window, its context cut on the left. Several, as of a rolling text behind
        the context's last token, where the continuation alone is too long; none if it is empty."""
        before, scored = self.pair(context, continuation)
        if not before:
            before, scored = scored[:1], scored[1:]
        if not scored:
            return []
        if len(scored) > self._max:
            return list(rolling_windows(before[-1:], scored, self._max))
        return [Window(tuple([*before, *scored][-(self._max + 1) : -1]), tuple(scored))]

    def rolling(self, text: str) -> list[Window]:
        """Windows that score every token of a text once."""
        ids = self._encode(text)
        prefix = self._prefix or ids[:1]
        return list(rolling_windows(prefix, ids if self._prefix else ids[1:], self._max))

    def prompt(self, context: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Ids to continue, cut on the left, and by how many tokens. Where the new tokens would leave no room for a
        prompt, half of the length is kept for each."""
        ids = self._bos + self._encode(context) or self._prefix
        room = self._max - max_new_tokens if max_new_tokens < self._max else max(1, self._max // 2)
        kept = ids[-room:]
        return kept, min(max_new_tokens, max(1, self._max - len(kept)))


def rolling_windows(prefix: Sequence[int], ids: Sequence[int], max_length: int) -> Iterator[Window]:
    """`get_rolling_token_windows` and `make_disjoint_window` of lm_eval, with one token of context: the first window
    begins with the prefix, later ones with the token before their first; the last reaches back to be of full length.
    """
    done = min(max_length, len(ids))
    if done:
        yield Window((*prefix, *ids[: done - 1]), tuple(ids[:done]))
    while done < len(ids):
        stop = min(done + max_length, len(ids))
        yield Window(tuple(ids[stop - max_length - 1 : stop - 1]), tuple(ids[done:stop]))
        done = stop
