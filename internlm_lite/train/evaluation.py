"""Evaluations: the loss on validation data and on some batches of the training data, and tasks. They change nothing
that training depends on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingSample
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.monitor.record import FolderFigures, ValidationRecord
from internlm_lite.monitor.scalars import perplexity
from internlm_lite.train.build import Run, RunServices, load_run
from internlm_lite.train.train_state import TrainState

logger = logging.getLogger("internlm_lite")
TaskScores = Mapping[str, Mapping[str, float]]
"""Task -> metric -> value."""


def evaluate(run: Run, state: TrainState) -> ValidationRecord:
    """Figures of the model after `state` on validation data. Collective; reads the device."""
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
    )


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
    """Figures of the tasks; none without tasks. Collective; reads the device."""
    if run.tasks is None:
        return {}
    run.trainer.optimizer.wait_weights()
    return run.tasks.scores(run.model, run.watchdog.report_progress)


def figures_of(found: ValidationRecord | None, tasks: TaskScores) -> dict[str, float]:
    """What `evaluation.keep_best` may name: name -> value."""
    named = {f"{task}/{metric}": value for task, of in tasks.items() for metric, value in of.items()}
    if found is None:
        return named
    own = {"loss": found.loss, "acc": found.acc, "perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}
    return named | {name: value for name, value in own.items() if value is not None}


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
    tasks = evaluate_tasks(run)
    found = replace(evaluate(run, run.start), tasks=tasks)
    if mesh.is_main:
        logger.info(f"{source or 'untrained weights'}: {found}")
