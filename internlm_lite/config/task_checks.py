"""Cross checks of the section `evaluation`. Names of tasks are checked when the tasks are opened, before training."""

from __future__ import annotations

from collections.abc import Iterator

from internlm_lite.config.plain import shown
from internlm_lite.config.problems import Problem
from internlm_lite.config.schema import Config, EvaluationConfig

VALIDATION_FIGURES = ("loss", "acc", "perplexity", "bits_per_byte")
"""What evaluation.keep_best may name besides TASK/METRIC."""
_TASKS = "evaluation.tasks"


def task_problems(config: Config) -> Iterator[Problem]:
    """A Problem for each key of `evaluation` that has no effect, or lacks what it needs."""
    asked, data = config.evaluation, config.data
    others = {
        name: value
        for name in ("every", "limit", "include_path", "num_fewshot", "max_tokens")
        if (value := getattr(asked, name)) is not None
    }
    if not asked.tasks:
        for name, value in others.items():
            text = f"found {shown(value)} without {_TASKS}; name some, or remove it"
            yield Problem((f"evaluation.{name}", _TASKS), text)
    elif data.tokenizer is None:
        yield Problem((_TASKS, "data.tokenizer"), "found without data.tokenizer; set it, or remove the tasks")
    elif asked.every is None and not data.valid_every:
        text = "found tasks that are never evaluated; set evaluation.every or data.valid_every, or remove them"
        yield Problem((_TASKS, "evaluation.every", "data.valid_every"), text)
    if repeated := [name for name in dict.fromkeys(asked.tasks) if asked.tasks.count(name) > 1]:
        yield Problem((_TASKS,), f"found {shown(repeated[0])} twice, expected each task once; remove one")
    if (built_in := [name for name in asked.tasks if name.startswith("cloze_")]) and data.valid_folder is None:
        text = f"found {shown(built_in[0])}, which is made of the text of data.valid_folder; set it, or remove the task"
        yield Problem((_TASKS, "data.valid_folder"), text)
    yield from _pairs(config)
    if asked.weights != "model" and config.ema is None:
        text = f"found {shown(asked.weights)} without ema = dict(...), so nothing is averaged; set it, or remove this"
        yield Problem(("evaluation.weights", "ema"), text)
    if asked.keep_best is not None:
        yield from _keep_best(config, asked.keep_best)


def _pairs(config: Config) -> Iterator[Problem]:
    """Of the task "pairs", which is for encoder-decoders."""
    asked, left_out, encoder = config.evaluation, EvaluationConfig(), "model.num_encoder_layers"
    if "pairs" not in asked.tasks:
        for name in ("pairs_folder", "pairs_sides", "beams", "length_penalty"):
            if (value := getattr(asked, name)) != getattr(left_out, name):
                text = f'found {shown(value)} without the task "pairs", which alone reads it; name it, or remove this'
                yield Problem((f"evaluation.{name}", _TASKS), text)
        return
    if not config.model.num_encoder_layers:
        yield Problem((_TASKS, encoder), f'found "pairs" with {encoder} 0: a decoder alone has no sources; remove it')
    if asked.pairs_folder is None or len(asked.pairs_sides) != 2:
        found = f"found {shown(asked.pairs_folder)} and {shown(asked.pairs_sides)}"
        text = f'{found}, expected a folder and the two sides of its pairs, such as "corpus/test" and ["de", "en"]'
        yield Problem(("evaluation.pairs_folder", "evaluation.pairs_sides", _TASKS), text)


def _keep_best(config: Config, figure: str) -> Iterator[Problem]:
    key, tasks = "evaluation.keep_best", config.evaluation.tasks
    averaged = figure.removeprefix("ema/") in VALIDATION_FIGURES and figure.startswith("ema/")
    if averaged and config.ema is None:
        text = f"found {shown(figure)} without ema = dict(...): there are no averaged weights; set it, or correct this"
        yield Problem((key, "ema"), text)
    task, _, metric = ("", "", figure.removeprefix("ema/")) if averaged else figure.rpartition("/")
    if (not task and metric not in VALIDATION_FIGURES) or (task and not metric):
        names = ", ".join(VALIDATION_FIGURES)
        yield Problem((key,), f"found {shown(figure)}, expected one of {names}, or TASK/METRIC; correct it")
    elif task and not tasks:
        yield Problem((key, _TASKS), f"found {shown(figure)} without {_TASKS}; name the task there, or correct it")
    elif not task and not config.data.valid_every:
        text = f"found {shown(figure)} with data.valid_every 0: there are no evaluations; set data.valid_every"
        yield Problem((key, "data.valid_every"), text)
    if not config.ckpt.enable_save_ckpt:
        text = f"found {shown(figure)} with ckpt.enable_save_ckpt=False; change one of them"
        yield Problem((key, "ckpt.enable_save_ckpt"), text)
