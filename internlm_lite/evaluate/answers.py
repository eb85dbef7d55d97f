"""What tasks ask of a model, in text: log-likelihoods of continuations, of whole texts, and generated text."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from internlm_lite.evaluate.encoding import TextEncoder, Window
from internlm_lite.evaluate.scorer import Scorer
from internlm_lite.generate.request import Request
from internlm_lite.generate.sample import Sampling

logger = logging.getLogger("internlm_lite")

DEFAULT_NEW_TOKENS = 256
"""lm_eval's `max_gen_toks` where a task names none."""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the same key in tasks; the first that is given counts."""
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")


class Answers:
    """Answers in the order of the questions. For rank 0, inside `Scorer.lead`."""

    def __init__(self, scorer: Scorer, encoder: TextEncoder, stop_ids: frozenset[int]) -> None:
        """`stop_ids`: tokens that end every generated text."""
        self._scorer, self._encoder, self._stop_ids = scorer, encoder, stop_ids

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding would give it) of each continuation behind its context."""
        return self._totals([self._encoder.windows(*pair) for pair in pairs])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """The log-probability of each text, every token scored once."""
        return [total for total, _ in self._totals([self._encoder.rolling(text) for text in texts])]

    def _totals(self, of_each: Sequence[Sequence[Window]]) -> list[tuple[float, bool]]:
        scores = iter(self._scorer.score([window for windows in of_each for window in windows]))
        totals = []
        for windows in of_each:
            parts = [next(scores) for _ in windows]
            totals.append((sum(part.log_probability for part in parts), all(part.is_greedy for part in parts)))
        return totals

    def continuations(self, prompts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What follows each prompt; `prompts`: (text, lm_eval's generation arguments). Raises ConfigError for values
        that `Sampling` refuses."""
        groups: dict[Sampling, list[int]] = {}
        requests = []
        for number, (text, arguments) in enumerate(prompts):
            groups.setdefault(_sampling(arguments), []).append(number)
            ids, length = self._encoder.prompt(text, _new_tokens(arguments))
            requests.append(Request(ids, length, self._stop_ids, _stop_strings(arguments), seed=number))
        texts = [""] * len(prompts)
        for sampling, numbers in groups.items():
            for number, text in zip(
                numbers, self._scorer.generate([requests[n] for n in numbers], sampling), strict=True
            ):
                texts[number] = text
        return texts


def _sampling(arguments: Mapping[str, Any]) -> Sampling:
    """Greedy unless the task asks for samples."""
    temperature = float(arguments.get("temperature") or 0.0)
    drawn = arguments.get("do_sample", temperature > 0)
    if not drawn:
        return Sampling(temperature=0.0)
    given = {name: arguments[name] for name in _SAMPLED if arguments.get(name) is not None}
    return Sampling(**given)


def _new_tokens(arguments: Mapping[str, Any]) -> int:
    given = (arguments[name] for name in _LENGTHS if arguments.get(name) is not None)
    return int(next(given, DEFAULT_NEW_TOKENS))


def _stop_strings(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    until = arguments.get("until") or []
    return tuple(text for text in ([until] if isinstance(until, str) else until) if text)
