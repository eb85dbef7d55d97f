"""Tasks of lm-evaluation-harness (package lm_eval, https://github.com/EleutherAI/lm-evaluation-harness, 0.4.9 or
newer), answered by our forward passes. The package is imported here alone, where a task of it is asked for."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from internlm_lite.errors import ConfigError, MissingPackageError, first_line
from internlm_lite.evaluate.answers import Answers

logger = logging.getLogger("internlm_lite")
Scores = dict[str, dict[str, float]]
"""Task -> metric -> value."""
Answer = TypeVar("Answer")
_FEWSHOT_SEED = 1234
"""lm_eval's default."""


class HarnessTasks:
    """Tasks of lm_eval by name, found and loaded when this is made."""

    def __init__(
        self, names: Sequence[str], include_path: str | None, num_fewshot: int | None = None, known: Sequence[str] = ()
    ) -> None:
        """As `find_tasks`, whose errors it raises; ConfigError, too, for a task that cannot be loaded."""
        self._names, self._num_fewshot = list(names), num_fewshot
        self._manager = find_tasks(self._names, include_path, known)
        self.higher_is_better: dict[str, bool] = {}
        """"TASK/METRIC" -> whether more is better, as the tasks say."""
        self._load()

    def _load(self) -> Any:
        try:
            loaded = self._manager.load(self._names)
        except Exception as error:
            raise ConfigError(
                f"evaluation.tasks: lm_eval cannot load {', '.join(self._names)} ({_first_line(error)}); "
                "correct the task's file, or see that its data can be read here"
            ) from error
        for name, task in loaded["tasks"].items():
            if self._num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self._num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            for metric, more in task.higher_is_better().items():
                self.higher_is_better[f"{name}/{metric}"] = bool(more)
        return loaded

    def scores(self, answers: Answers, limit: int | None) -> Scores:
        """Of all tasks and groups. `limit`: examples per task; None: all. Changes the state of random generators.
        Raises ConfigError where lm_eval cannot make a question of an example, or score its answer."""
        from lm_eval.evaluator import evaluate

        model, loaded = harness_model(answers), self._load()  # anew: a task object keeps the answers that it was given
        try:
            found = evaluate(lm=model, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=False)
        except Exception as error:
            if model.is_answering:
                raise
            raise ConfigError(
                f"evaluation.tasks: lm_eval fails on an example of {', '.join(self._names)} ({_first_line(error)}); "
                "correct the task's file or its data, or take the task out"
            ) from error
        return {name: dict(_figures(values)) for name, values in found["results"].items()}


def harness_model(answers: Answers) -> Any:
    """An `lm_eval.api.model.LM` that passes on what it is asked."""
    from lm_eval.api.model import LM

    class HarnessModel(LM):
        is_answering = False
        """Whether an answer is sought, or was and failed: then an error is not lm_eval's."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return self._answered(answers.log_likelihoods, [request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return self._answered(answers.rolling, [request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return self._answered(answers.continuations, [request.args for request in requests])

        def _answered(self, answer: Callable[[list[Any]], Answer], asked: list[Any]) -> Answer:
            self.is_answering = True
            found = answer(asked)
            self.is_answering = False
            return found

    return HarnessModel()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def find_tasks(names: Sequence[str], include_path: str | None, known: Sequence[str]) -> Any:
    """The TaskManager that has all tasks: of `include_path` alone if that suffices, since lm_eval's own take seconds
    to be listed. Loads none.

    `include_path`: a folder of task files (YAML, with their data beside them), searched before those that come with
    lm_eval; `known`: other names, for messages. Raises ConfigError for a task that is not there, with near names,
    MissingPackageError without the package."""
    if find_spec("lm_eval") is None:
        raise MissingPackageError(
            f"evaluation.tasks: found {', '.join(map(repr, names))}, which is none of the built-in tasks "
            f"{', '.join(known)}; others come from lm_eval, which is not installed: pip install internlm_lite[eval]"
        )
    if include_path is not None and not Path(include_path).is_dir():
        raise ConfigError(
            f"evaluation.include_path: found no folder {include_path}, expected one with task files of lm_eval; "
            "correct the path"
        )
    from lm_eval.tasks import TaskManager

    managers = ({"include_defaults": False}, {}) if include_path else ({},)
    for options in managers:
        manager = TaskManager(include_path=include_path, **options)
        there = set(manager.all_tasks)
        missing = [name for name in names if name not in there]
        if not missing:
            return manager
    near = difflib.get_close_matches(missing[0], [*known, *sorted(there)], n=3, cutoff=0.5)
    where = "" if include_path is None else f" and the files in evaluation.include_path={include_path}"
    raise ConfigError(
        f"evaluation.tasks: found {', '.join(map(repr, missing))}, expected built-in tasks ({', '.join(known)}) or "
        f"tasks of lm_eval{where}; {'nearest: ' + ', '.join(near) if near else 'lm_eval ls tasks lists them'}"
    )


def _figures(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Numbers of a task: "acc,none" is acc; those of other filters keep both names; no standard errors."""
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if kind and isinstance(value, int | float) and not metric.endswith("_stderr"):
            yield (metric if kind == "none" else key), float(value)
