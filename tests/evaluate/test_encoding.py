"""Which ids of a text are fed and which are scored."""

from __future__ import annotations

from typing import Any

import pytest

from internlm_lite.evaluate.encoding import TextEncoder, Window, rolling_windows

BOS, EOS = 1, 2


class Letters:
    """A tokenizer of letters, with a token for each of some pieces that it takes whole."""

    def __init__(self, *pieces: str, bos: int | None = BOS, eos: int | None = EOS) -> None:
        self._pieces, self.bos, self.eos = sorted(pieces, key=len, reverse=True), bos, eos

    def encode(self, text: str) -> list[int]:
        ids = []
        while text:
            piece = next((piece for piece in self._pieces if text.startswith(piece)), text[0])
            ids.append(self.id(piece))
            text = text[len(piece) :]
        return ids

    def id(self, piece: str) -> int:
        return ord(piece) if len(piece) == 1 else 1000 + self._pieces.index(piece)


def encoder(max_length: int = 100, *pieces: str, **tokens: Any) -> TextEncoder:
    return TextEncoder(Letters(*pieces, **tokens), max_length)  # type: ignore[arg-type]


def ids(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_continuation_inside_a_token_of_both_is_encoded_alone() -> None:
    """Cut behind the context's ids nothing would be left to score: a crash in lm_eval."""
    before, scored = encoder(100, "world").pair("hello wor", "ld")
    assert (before, scored) == ([BOS, *ids("hello wor")], ids("ld"))
    whole = Letters("lo w")
    assert encoder(100, "lo w").pair("hel", "lo w")[1] == [whole.id("lo w")]


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation() -> None:
    assert encoder().pair("ab \n", "c") == ([BOS, *ids("ab")], ids(" \nc"))
    assert encoder().pair("  ", "c") == ([BOS], ids("  c"))
    assert encoder().pair("", " c") == ([BOS], ids(" c"))


@pytest.mark.parametrize(("bos", "prefix"), [(BOS, [BOS]), (None, [EOS])])
def test_one_bos_at_the_start_as_in_training(bos: int | None, prefix: list[int]) -> None:
    """Missing or doubled it costs most of a task's accuracy. Without one, texts begin with themselves; only what has
    no context begins with EOS."""
    coder, start = encoder(bos=bos), [] if bos is None else [bos]
    (window,) = coder.windows("ab", "c")
    assert window == Window((*start, *ids("ab")), tuple(ids("c")))
    assert coder.windows("", "cd") == [Window((*prefix, *ids("c")), tuple(ids("cd")))]
    assert coder.rolling("cd") == [Window((*prefix, *ids("c")), tuple(ids("cd")))]
    assert coder.prompt("ab", 5) == ([*start, *ids("ab")], 5)
    assert coder.prompt("", 5) == (prefix, 5)
    for window in [*coder.windows("ab", "c"), *coder.rolling("abc")]:
        assert window.tokens.count(BOS) + window.tokens.count(EOS) == (1 if bos or window.tokens[0] == EOS else 0)


def test_without_bos_and_eos_the_first_token_is_not_scored() -> None:
    coder = encoder(bos=None, eos=None)
    assert coder.windows("", "abc") == [Window(tuple(ids("ab")), tuple(ids("bc")))]
    assert coder.rolling("abc") == [Window(tuple(ids("ab")), tuple(ids("bc")))]
    assert coder.windows("", "a") == coder.rolling("a") == coder.rolling("") == []


def test_a_context_is_cut_on_the_left_and_never_scored() -> None:
    """The border is that of the continuation, not a place in what is left after the cut."""
    assert encoder(3).windows("abc", "de") == [Window(tuple(ids("bcd")), tuple(ids("de")))]
    assert encoder(2).windows("abc", "de") == [Window(tuple(ids("cd")), tuple(ids("de")))]
    assert encoder(1).windows("abc", "d") == [Window(tuple(ids("c")), tuple(ids("d")))]
    assert encoder(2).windows("ab", "") == []


def test_a_continuation_longer_than_the_model_reads_is_scored_once_per_token() -> None:
    windows = encoder(3).windows("ab", "cdefg")
    assert [token for window in windows for token in window.targets] == ids("cdefg")
    assert windows[0].tokens[0] == ord("b") and all(len(window.tokens) <= 3 for window in windows)


@pytest.mark.parametrize("max_length", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 10, 11, 12])
def test_rolling_windows_score_each_token_once(max_length: int, count: int) -> None:
    """As lm_eval's two functions; the prefix is in the first window alone, and the last reaches back."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(10, 10 + count))
    found = list(rolling_windows([BOS], tokens, max_length))
    expected = map(make_disjoint_window, get_rolling_token_windows(tokens, BOS, max_length, 1))
    both = [(window.tokens[: len(window.tokens) - len(window.targets) + 1], window.targets) for window in found]
    assert both == [(tuple(context), tuple(scored)) for context, scored in expected]
    assert [token for window in found for token in window.targets] == tokens
    assert [BOS in window.tokens for window in found] == [n == 0 for n in range(len(found))]
    assert all(len(window.tokens) <= max_length for window in found)
    assert len(found) == -(-count // max_length)


def test_a_prompt_longer_than_the_model_reads_leaves_room_for_the_answer() -> None:
    """Many examples, or lm_eval's 256 new tokens with a short seq_len: cut, not an overrun."""
    prompt = "x" * 300 + "abc"
    kept, new = encoder(256).prompt(prompt, 16)
    assert len(kept) == 240 and new == 16 and kept[-3:] == ids("abc")
    for wanted in (256, 1000):
        kept, new = encoder(256).prompt(prompt, wanted)
        assert len(kept) == new == 128 and kept[-3:] == ids("abc")
    assert encoder(256).prompt("abc", 256) == ([BOS, *ids("abc")], 252)
    assert encoder(1).prompt("abc", 4) == (ids("c"), 1)
