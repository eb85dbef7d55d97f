"""Evaluations: the loss on validation data and on some batches of the training data, and tasks. They change nothing
that training depends on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internlm_lite.checkpoint.format.weight_roles import Weights, with_weights
from internlm_lite.config.schema import (
    CkptConfig,
    Config,
    EvaluationConfig,
    GuardConfig,
    MonitorConfig,
    OptimizerConfig,
)
from internlm_lite.data.data_loader import TrainingSample
from internlm_lite.errors import CheckpointError, StorageError
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.monitor.jsonl import finite
from internlm_lite.monitor.record import FolderFigures, ValidationRecord, task_words
from internlm_lite.monitor.scalars import perplexity
from internlm_lite.train.build import Run, RunServices, load_run
from internlm_lite.train.train_state import TrainState

logger = logging.getLogger("internlm_lite")
TaskScores = Mapping[str, Mapping[str, float]]
"""Task -> metric -> value."""
AVERAGED = "@ema"
"""Behind the name of a task that the averaged weights were asked."""
_ALL = 10**9


def evaluate(run: Run, state: TrainState) -> ValidationRecord:
    """Figures of the model after `state`, and of the averaged weights if there are any. Collective; waits for them."""
    assert run.valid is not None, "an evaluation is due only with validation data"
    found = run.trainer.evaluate(run.valid, run.watchdog.report_progress)
    train_loss, n_batches = None, run.config.data.valid_train_batches
    if n_batches:
        sample = TrainingSample(run.data, run.valid.micro_num, n_batches)
        train_loss = run.trainer.evaluate(sample, run.watchdog.report_progress).cross_entropy
    folders = with_bits(found.folders, run.valid.bytes_per_label)
    return ValidationRecord(
        step=state.step - 1,
        loss=found.cross_entropy,
        acc=found.accuracy,
        perplexity=perplexity(found.cross_entropy),
        folders=folders,
        train_loss=train_loss,
        bits_per_byte=overall_bits(folders, run.valid.bytes_per_label),
        ema=_of_averages(run),
    )


def _of_averages(run: Run) -> dict[str, float] | None:
    """See `ValidationRecord.ema`."""
    if run.trainer.optimizer.average is None or run.valid is None:
        return None
    with run.trainer.optimizer.averaged():
        found = run.trainer.evaluate(run.valid, run.watchdog.report_progress)
    bits = overall_bits(found.folders, run.valid.bytes_per_label)
    figures = {"loss": found.cross_entropy, "acc": found.accuracy, "perplexity": perplexity(found.cross_entropy)}
    return figures | ({} if bits is None else {"bits_per_byte": bits})


def with_bits(
    folders: Mapping[str, FolderFigures], bytes_per_label: Mapping[str, float | None]
) -> dict[str, FolderFigures]:
    """The figures with bits per byte, of folders whose bytes are known: bits per label / bytes per label. Over whole
    folders these are the bits of all labels over the bytes of all text; over a part, the folder's mean bytes are taken.
    """
    return {
        name: replace(figures, bits_per_byte=figures.loss / math.log(2) / per_label)
        if (per_label := bytes_per_label[name]) and figures.tokens
        else figures
        for name, figures in folders.items()
    }


def overall_bits(folders: Mapping[str, FolderFigures], bytes_per_label: Mapping[str, float | None]) -> float | None:
    """All bits over all bytes; None if the bytes of a folder that was evaluated are not known."""
    sizes = {name: figures.tokens * (bytes_per_label[name] or 0) for name, figures in folders.items() if figures.tokens}
    if not sizes or not all(sizes.values()):
        return None
    bits = sum(folders[name].loss * folders[name].tokens / math.log(2) for name in sizes)
    return bits / sum(sizes.values())


def evaluate_tasks(run: Run) -> TaskScores:
    """Figures of the tasks by the weights that evaluation.weights names; none without tasks. Collective; reads the
    device."""
    if run.tasks is None:
        return {}
    optimizer, which = run.trainer.optimizer, run.config.evaluation.weights
    optimizer.wait_weights()
    scores: dict[str, Mapping[str, float]] = {}
    if which != "ema":
        scores |= run.tasks.scores(run.model, run.watchdog.report_progress)
    if which != "model":
        with optimizer.averaged():
            found = run.tasks.scores(run.model, run.watchdog.report_progress)
        scores |= {f"{name}{AVERAGED}": figures for name, figures in found.items()}
    return scores


def figures_of(found: ValidationRecord | None, tasks: TaskScores) -> dict[str, float]:
    """What `evaluation.keep_best` may name: name -> value."""
    named = {f"{task}/{metric}": value for task, of in tasks.items() for metric, value in of.items()}
    if found is None:
        return named
    own = {"loss": found.loss, "acc": found.acc, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    averaged = {f"ema/{name}": value for name, value in (found.ema or {}).items()}
    return named | averaged | {name: value for name, value in own.items() if value is not None}


def without_saves(config: Config) -> Config:
    """The config to evaluate with and stop: it locks and writes nothing, and other training data do not matter."""
    ckpt = config.ckpt.model_copy(update={"enable_save_ckpt": False, "allow_changed_data": True})
    data = config.data.model_copy(update={"valid_every": config.data.valid_every or 1})
    return config.model_copy(update={"ckpt": ckpt, "data": data})


def evaluate_only(config: Config, mesh: Mesh, resume: str | None, services: RunServices) -> None:
    """Evaluate the checkpoint that `resume` names and log the figures. Collective; `config`: of `without_saves`.

    Raises CheckpointError if there is none: untrained weights are evaluated only with `resume` "none".
    """
    run = load_run(config, mesh, Path(), resume or ("auto" if config.ckpt.auto_resume else "none"), services)
    source = run.checkpoints.restored or config.ckpt.load_model_only_folder
    if source is None and resume != "none":
        raise CheckpointError(
            f"--eval-only: found no checkpoint in ckpt.save_ckpt_folder={config.ckpt.save_ckpt_folder}; expected one: "
            "name it with --resume PATH, or evaluate untrained weights with --resume none"
        )
    run.watchdog.enter("evaluation")
    found = replace(evaluate(run, run.start), tasks=evaluate_tasks(run))
    if mesh.is_main:
        logger.info(f"{source or 'untrained weights'}: {found}")


@dataclass(frozen=True)
class CheckpointEvaluation:
    """What tools/evaluate.py does besides the config."""

    weights: Sequence[Weights]
    """Which weights of the checkpoint, one after the other; at least one."""
    output: Path | None = None
    """A JSON file for the figures."""


def config_to_evaluate(config: Config, checkpoint: str, valid_batches: int | None = None) -> Config:
    """The config to evaluate the weights of `checkpoint` with, whatever it was trained on. `valid_batches`: None: all
    validation data."""
    data = config.data
    batches = {"valid_every": int(data.valid_folder is not None), "valid_batches": valid_batches or _ALL}
    training = {"train_folder": None, "weights": None, "valid_train_batches": 0, "valid_at_start": False}
    training |= {"total_steps": data.total_steps or _ALL, "epochs": None, "total_tokens": None, "max_epochs": None}
    tasks = {"every": None if data.valid_folder else 1, "weights": "model", "keep_best": None}
    steps = config.lr_scheduler.total_steps or _ALL
    ckpt = CkptConfig(load_model_only_folder=checkpoint, auto_resume=False, s3=config.ckpt.s3)
    return config.model_copy(
        update={
            "ckpt": ckpt,
            "data": data.model_copy(update={**batches, **training}),
            "evaluation": EvaluationConfig.model_validate({**config.evaluation.model_dump(), **tasks}),
            "monitor": MonitorConfig(tensorboard=False),
            "lr_scheduler": config.lr_scheduler.model_copy(update={"total_steps": steps}),
            "guard": GuardConfig(),
            "ema": None,
            "stages": [],
        }
    )


def evaluate_checkpoint(config: Config, mesh: Mesh, asked: CheckpointEvaluation, services: RunServices) -> None:
    """Log the figures of a checkpoint, and write them to `asked.output`. Collective; `config`: of
    `config_to_evaluate`. Raises CheckpointError, DataError, ConfigError; StorageError if the file cannot be written."""
    path = config.ckpt.load_model_only_folder
    assert path is not None, "the config names the checkpoint"
    if config.model.scaling == "standard":  # SGD has no state that would take memory
        config = config.model_copy(update={"optimizer": OptimizerConfig(name="sgd")})
    run = load_run(config, mesh, Path(), "none", replace(services, weights=asked.weights[0]))
    figures: dict[str, Any] = {}
    source = run.checkpoints.weights_from
    assert source is not None, "restored from there"
    for weights in asked.weights[1:]:  # found missing now, not after an evaluation
        with_weights(source, weights)
    for number, weights in enumerate(asked.weights):
        if number:
            run.watchdog.enter("loading")
            run.checkpoints.load_weights(path, weights)
        run.watchdog.enter("evaluation")
        found = None if run.valid is None else evaluate(run, TrainState())
        tasks = evaluate_tasks(run)
        figures[weights] = _as_json(found, tasks)
        if mesh.is_main:
            said = "" if found is None else f" {str(found).partition(': ')[2]}"
            logger.info(f"checkpoint {source.name}, weights {weights}:{said}{task_words(tasks)}")
    document = {"checkpoint": source.name, "step": source.step, "weights": figures}
    if asked.output is not None:
        on_main(mesh, lambda: _write(asked.output, document))


def _as_json(found: ValidationRecord | None, tasks: TaskScores) -> dict[str, Any]:
    values: dict[str, Any] = {"tasks": tasks}
    if found is not None:
        values |= {name: getattr(found, name) for name in ("loss", "acc", "perplexity", "bits_per_byte")}
        keys = ("tokens", "loss", "acc", "bits_per_byte")
        values["folders"] = {
            name: {key: getattr(folder, key) for key in keys} for name, folder in found.folders.items()
        }
    return values


def _write(path: Path | None, document: Mapping[str, Any]) -> None:
    assert path is not None
    try:
        path.write_text(json.dumps(finite(document), indent=1, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise StorageError(f"--output {path}: {error.strerror}; give another path") from None
