"""The tasks of a run, built-in ones and those of lm_eval: checked before training, scored when they are due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from internlm_lite.config.schema import Config
from internlm_lite.data.folders import Folder, find_folders
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import ConfigError
from internlm_lite.evaluate.answers import Answers
from internlm_lite.evaluate.cloze import BUILT_IN, DEFAULT_LIMIT, HIGHER_IS_BETTER, Question, make_questions, scores_of
from internlm_lite.evaluate.encoding import TextEncoder
from internlm_lite.evaluate.harness import HarnessTasks, Scores, find_tasks
from internlm_lite.evaluate.pair_task import PAIR_FIGURES, PAIRS, PairTask, require_sacrebleu
from internlm_lite.evaluate.random_states import kept_random_states
from internlm_lite.evaluate.scorer import Scorer
from internlm_lite.generate.prompts import end_ids
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import WholeModel

_LONGEST_TEXT = 1 << 14
"""Tokens of a document that questions are made of."""


KNOWN = (*BUILT_IN, PAIRS)
"""Tasks of our own."""


def require_tasks(config: Config) -> None:
    """Raises the errors of `TaskSuite` for tasks that are not there, or whose package is not; loads none."""
    asked = config.evaluation
    if PAIRS in asked.tasks:
        require_sacrebleu()
    if others := [name for name in asked.tasks if name not in KNOWN]:
        find_tasks(others, asked.include_path, KNOWN)


class TaskSuite:
    """Rank 0 has the questions; every rank has the tokenizer, which finds stop strings."""

    def __init__(self, config: Config, mesh: Mesh) -> None:
        """Collective. Raises ConfigError for unknown tasks, DataError for a tokenizer or data that cannot be read,
        MissingPackageError without lm_eval or sacrebleu, where a task needs it; on all ranks."""
        asked, path = config.evaluation, config.data.tokenizer
        assert path is not None, "tasks without a tokenizer are refused with the config"
        self._config, self._mesh = config, mesh
        self._tokenizer = on_all(mesh, lambda: Tokenizer(Path(path)))
        self._built_in = [name for name in asked.tasks if name in BUILT_IN]
        self._others = [name for name in asked.tasks if name not in KNOWN]
        self._questions: dict[str, list[Question]] = {}
        self._pairs: PairTask | None = None
        self._harness: HarnessTasks | None = None
        self.higher_is_better: dict[str, bool] = on_main(mesh, self._open)
        """"TASK/METRIC" -> whether more is better, as the tasks say; groups and filters of lm_eval are not named."""

    def _open(self) -> dict[str, bool]:
        with kept_random_states(self._mesh.device):
            asked, found = self._config.evaluation, {}
            if self._others:
                self._harness = HarnessTasks(self._others, asked.include_path, asked.num_fewshot, KNOWN)
                found = self._harness.higher_is_better
            for name in self._built_in:
                self._questions[name] = made = make_questions(name, self._texts(), asked.limit or DEFAULT_LIMIT)
                if not made:
                    raise ConfigError(
                        f"evaluation.tasks: {name}: found no question in the text of {self._config.data.valid_folder}; "
                        "expected texts of several sentences: take the task out, or add validation data"
                    )
                found |= {f"{name}/{metric}": more for metric, more in HIGHER_IS_BETTER[name].items()}
            if PAIRS in asked.tasks:
                self._pairs = PairTask(self._config, self._tokenizer)
                found |= {f"{PAIRS}/{metric}": more for metric, more in PAIR_FIGURES.items()}
            _check_figure(asked.keep_best, found)
            return found

    def _texts(self) -> Iterator[str]:
        """The documents of the validation data, one of each folder in turn, in the order of the files."""
        folder = self._config.data.valid_folder
        assert folder is not None, "built-in tasks without validation data are refused with the config"
        of_folders = [self._texts_of(found) for found in find_folders(Path(folder), "valid_folder", log=False)]
        yield from (text for texts in zip_longest(*of_folders) for text in texts if text)

    def _texts_of(self, folder: Folder) -> Iterator[str]:
        for file in folder.files:
            for document, length in enumerate(file.lengths.tolist()):
                signed = file.tokens(document, 0, min(length, _LONGEST_TEXT)).astype(np.int64)
                yield self._tokenizer.decode(np.abs(signed).tolist())

    def scores(self, model: WholeModel, progress: Callable[[], object] = lambda: None) -> Scores:
        """Figures of all tasks, on all ranks. Changes nothing that training depends on. Collective."""
        data, asked = self._config.data, self._config.evaluation
        scorer = Scorer(model, self._mesh, self._tokenizer, data.micro_bsz * data.seq_len, progress)
        encoder = TextEncoder(self._tokenizer, asked.max_tokens or data.seq_len)
        answers = Answers(scorer, encoder, end_ids(self._tokenizer))

        def work() -> Scores:
            found = {name: scores_of(name, made, answers) for name, made in self._questions.items()}
            if self._pairs is not None:
                found[PAIRS] = self._pairs.scores(scorer)
            if self._harness is not None:
                found |= self._harness.scores(answers, asked.limit)
            return found

        with kept_random_states(self._mesh.device):
            return scorer.lead(work)


def _check_figure(figure: str | None, known: dict[str, bool]) -> None:
    """Raises ConfigError if evaluation.keep_best names a metric that its task does not have."""
    task, _, metric = (figure or "").rpartition("/")
    there = [name for name in known if name.startswith(f"{task}/")]
    if there and f"{task}/{metric.partition(',')[0]}" not in there:
        raise ConfigError(f'evaluation.keep_best: found "{figure}", expected one of {", ".join(there)}; correct it')
