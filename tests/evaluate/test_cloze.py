"""Questions made of text: the same every time, each with one right answer."""

from __future__ import annotations

import math

import pytest

from internlm_lite.evaluate.cloze import BUILT_IN, HIGHER_IS_BETTER, Question, make_questions, scores_of
from tests.evaluate.made_run import texts

CODE = "".join(f"def function_{n}(first, last{n}):\n    return first + value{n}\n" for n in range(12))
CHINESE = (
    "今天天气很好我们去公园散步。明天会下雨所以留在家里读书。"
    + "后天是星期一大家都要上班工作。孩子们在学校里学习写字。" * 2
)


@pytest.mark.parametrize("task", BUILT_IN)
@pytest.mark.parametrize("text", [texts(0, 1)[0], CODE, CHINESE], ids=["english", "code", "chinese"])
def test_questions_come_from_the_text(task: str, text: str) -> None:
    found = make_questions(task, [text], 100)
    assert found and len(found) <= 8
    for question in found:
        right, *others = question.choices
        assert question.context + right in text and right not in others
        assert len(set(question.choices)) == 4 and all(other in text for other in others)
        assert len(question.context) >= 40
    assert make_questions(task, [text], 100) == found
    assert make_questions(task, [text], 1) == found[:1]


def test_texts_without_sentences_give_no_question() -> None:
    for task in BUILT_IN:
        assert make_questions(task, ["", "one", "....", "a b c d e f g"], 10) == []


class Told:
    """Answers from a table: the log-probability of a continuation."""

    def __init__(self, table: dict[str, float]) -> None:
        self._table = table

    def log_likelihoods(self, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
        return [(self._table[choice], self._table[choice] > -1) for _, choice in pairs]


def test_what_lengths_are_divided_by() -> None:
    """acc_norm divides by characters, as in lm_eval, and acc_bytes by UTF-8 bytes, as the paper of GPT-3 has it of
    "normalised by length": with other letters than ASCII the two choose differently."""
    ascii_first = [Question("?", ("abcd", "éé")), Question("?", ("éé", "abcd"))]
    answers = Told({"abcd": -3.0, "éé": -1.6})
    found = scores_of("cloze_word", ascii_first, answers)  # type: ignore[arg-type]
    assert found == {"acc": 0.5, "acc_norm": 0.5, "acc_bytes": 0.5}
    first, second = (scores_of("cloze_word", [one], answers) for one in ascii_first)  # type: ignore[arg-type]
    assert first == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0}, "-3/4 > -1.6/2, but -3/4 < -1.6/4"
    assert second == {"acc": 1.0, "acc_norm": 0.0, "acc_bytes": 1.0}


def test_greedy_words() -> None:
    questions = [Question("?", ("likely", "x")), Question("?", ("not", "x"))]
    found = scores_of("cloze_greedy", questions, Told({"likely": -0.5, "not": -3.5}))  # type: ignore[arg-type]
    assert found == {"acc": 0.5, "perplexity": pytest.approx(math.exp(2))}
    assert set(found) == set(HIGHER_IS_BETTER["cloze_greedy"])
