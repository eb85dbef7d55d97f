"""Beam search against enumeration of every continuation, against a search without cache or bound, and with no beams."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from internlm_lite.generate.beams import Beams, BeamSearch
from internlm_lite.generate.decode import generate
from internlm_lite.generate.request import Continuation, Growing, Request
from internlm_lite.generate.sample import Sampling, SeenTokens
from internlm_lite.models.decoder import Transformer
from tests.generate.test_generate import all_logits, whole
from tests.models.small import small_model

WINDOWED = {"sliding_window": 3, "attention_softcap": 0.8}
ENDS = frozenset({1, 4})
PENALTIES = (-1.0, -0.3, 0.0, 0.5, 1.0, 2.0)


def tiny(**changes: object) -> Transformer:
    return small_model(vocab_size=5, num_layers=1, init_std=0.4, **changes)


class LogProbabilities:
    """Of every next token after a prefix, computed without a cache, once per prefix."""

    def __init__(self, model: Transformer) -> None:
        self.model, self.known = model, dict[tuple[int, ...], list[float]]()

    def __call__(self, prefix: tuple[int, ...]) -> list[float]:
        if prefix not in self.known:
            self.known[prefix] = all_logits(self.model, list(prefix))[-1].log_softmax(-1).tolist()
        return self.known[prefix]

    def of(self, prompt: tuple[int, ...], continuation: tuple[int, ...]) -> float:
        return sum(self((*prompt, *continuation[:i]))[token] for i, token in enumerate(continuation))


def every_continuation(vocab: int, longest: int) -> list[tuple[int, ...]]:
    """All that end at a stop token, and those of the full length."""
    going = [token for token in range(vocab) if token not in ENDS]
    ended = [(*start, end) for n in range(longest) for start in product(going, repeat=n) for end in sorted(ENDS)]
    return ended + list(product(going, repeat=longest))


def search_without_bound(log_p: LogProbabilities, prompt: tuple[int, ...], longest: int, how: Beams) -> float:
    """The same rules, to the full length, on whole sequences: the best score."""
    live, ended = [(0.0, prompt)], list[float]()
    for length in range(1, longest + 1):
        candidates = [(total + p, (*s, token)) for total, s in live for token, p in enumerate(log_p(s))]
        candidates.sort(key=lambda candidate: -candidate[0])
        over = [length == longest or sequence[-1] in ENDS for _, sequence in candidates]
        ended += [
            total / length**how.length_penalty
            for total, _ in [c for c, o in zip(candidates[: how.beams], over, strict=False) if o]
        ]
        live = [candidate for candidate, o in zip(candidates, over, strict=True) if not o][: how.beams]
    return max(ended)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_with_enough_beams_the_best_of_all_continuations_is_found(penalty):
    model, prompt, longest = tiny(), (0, 2, 2, 3, 0), 6
    log_p = LogProbabilities(model)
    scores = {c: log_p.of(prompt, c) / len(c) ** penalty for c in every_continuation(5, longest)}
    best = max(scores, key=scores.__getitem__)
    (found,) = generate(whole(model), [Request(prompt, longest, ENDS)], Beams(3**longest, penalty))
    assert found.score == pytest.approx(scores[best], abs=1e-10)
    assert tuple(found.tokens) == (best[:-1] if best[-1] in ENDS else best)
    assert found.ended_by == ("stop" if best[-1] in ENDS else "length")


def test_the_penalty_decides_how_long_the_best_is():
    requests = [Request([0, 2, 2, 3, 0], 12, ENDS)]
    lengths = [len(generate(whole(tiny()), requests, Beams(4, penalty))[0].tokens) for penalty in PENALTIES]
    assert lengths == [0, 0, 0, 5, 5, 12]


@pytest.mark.parametrize(("penalty", "changes"), [*((penalty, {}) for penalty in PENALTIES), (0.5, WINDOWED)])
def test_few_beams_find_what_a_search_without_cache_and_bound_finds(penalty, changes):
    """A bound of the wrong length ends early, a cache left in its order changes scores, few candidates lose beams."""
    model = tiny(**changes)
    log_p, prompts = LogProbabilities(model), [(2, 0, 3), (0,), (3, 3), (0, 2, 2, 3, 0)]
    for beams in (1, 2, 3):
        how = Beams(beams, penalty)
        found = generate(whole(model), [Request(prompt, 12, ENDS) for prompt in prompts], how)
        expected = [search_without_bound(log_p, prompt, 12, how) for prompt in prompts]
        assert [row.score for row in found] == pytest.approx(expected, abs=1e-10)


def test_one_beam_without_stop_tokens_is_greedy():
    model = whole(small_model(init_std=1.0))
    requests = [Request([3, 5], 9), Request([7], 4)]
    greedy = [row.tokens for row in generate(model, requests, Sampling(temperature=0))]
    assert [row.tokens for row in generate(model, requests, Beams(1))] == greedy


def search_table(table: dict[str, dict[str, float]], beams: int, penalty: float) -> tuple[Continuation, int]:
    """A search where the last letter decides the probabilities of the next; "." ends. Also how many steps it took."""
    letters = ".abcd"
    logits = torch.full((5, 5), -1e9, dtype=torch.float64)
    for last, following in table.items():
        for letter, probability in following.items():
            logits[letters.index(last), letters.index(letter)] = math.log(probability)
    request = Request([1], 1000, frozenset({0}))
    how, rows = Beams(beams, penalty), [Growing(request, lambda ids: "".join(letters[i] for i in ids))]
    search, tokens, steps = BeamSearch(rows, how, SeenTokens([[1]], 1.0, 5, torch.device("cpu"))), [1], 0
    while tokens:
        _, tokens = search.choose(logits[tokens])
        steps += 1
    return search.results()[0], steps


TABLES = {
    "a certain end ends the search at once": ({"a": {".": 0.9, "b": 0.1}, "b": {"b": 1.0}}, 1, 0.0, "", 0.9, 1),
    "what ends outside of the beams does not count": (
        {"a": {"b": 0.6, ".": 0.4}, "b": {".": 0.5, "c": 0.5}, "c": {"c": 1.0}},
        1,
        0.0,
        "b",
        0.3,
        2,
    ),
    "a negative penalty is bounded by the next length, not by the longest": (
        {"a": {"b": 0.9, ".": 0.1}, "b": {"c": 0.9, ".": 0.1}, "c": {".": 1.0}},
        2,
        -1.0,
        "bc",
        0.81,
        3,
    ),
    "a positive penalty is bounded by the longest length, not by the present one": (
        {"a": {".": 0.9, "b": 0.1}, "b": {"b": 1.0}},
        1,
        1.0,
        "b" * 1000,
        0.1,
        1000,
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_when_a_search_ends(case):
    table, beams, penalty, text, probability, n_steps = TABLES[case]
    found, steps = search_table(table, beams, penalty)
    assert (found.text, steps) == (text, n_steps)
    length = len(text) + (len(text) < 1000)
    assert found.score == pytest.approx(math.log(probability) / length**penalty, abs=1e-9)


def test_stop_strings_end_beams_as_stop_tokens_do():
    model, by_text = whole(tiny()), Request([2, 0], 8, stop_strings=("b", "e"))

    def letters(ids):
        return "".join("abcde"[token] for token in ids)

    for penalty in PENALTIES:
        (found,) = generate(model, [by_text], Beams(5, penalty), letters)
        (expected,) = generate(model, [Request([2, 0], 8, ENDS)], Beams(5, penalty), letters)
        assert found.text == expected.text and found.score == pytest.approx(expected.score, abs=1e-12)
