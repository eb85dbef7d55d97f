"""The numbers of a run under the tags that TensorBoard and wandb show: train/loss, lr, loss/<folder>, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping

from internlm_lite.monitor.line import FIGURES
from internlm_lite.monitor.record import FolderFigures, StepRecord, ValidationRecord

FOLDER_FIGURES = ("loss", "acc", "perplexity", "tokens")
"""Each has one series per folder: loss/code, loss/docs, ..."""


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Tag -> number of a step line. Unknown numbers, and means of a folder without tokens, are left out."""
    return {
        **{figure.tag: value for figure in FIGURES if figure.tag and (value := figure.of(record)) is not None},
        **{f"grad_norm/{name}": norm for name, norm in record.grad_norm.items()},
        **_folders(record.folders, ""),
    }


def validation_scalars(record: ValidationRecord) -> dict[str, float]:
    """Tag -> number of an evaluation: valid/loss, val_loss/<folder>, ..."""
    return {
        "valid/loss": record.loss,
        "valid/acc": record.acc,
        "valid/perplexity": record.perplexity,
        **({} if record.train_loss is None else {"valid/train_loss": record.train_loss}),
        **({} if record.bits_per_byte is None else {"valid/bits_per_byte": record.bits_per_byte}),
        **task_scalars(record.tasks),
        **{f"valid/ema_{name}": value for name, value in (record.ema or {}).items()},
        **_folders(record.folders, "val_"),
    }


def task_scalars(tasks: object) -> dict[str, float]:
    """Tag -> number of the "tasks" of an event, which are task -> metric -> value: task/<task>/<metric>."""
    if not isinstance(tasks, Mapping):
        return {}
    return {f"task/{name}/{metric}": value for name, of in tasks.items() for metric, value in of.items()}


def _folders(folders: Mapping[str, FolderFigures], prefix: str) -> dict[str, float]:
    scalars: dict[str, float] = {}
    for name, folder in folders.items():
        scalars[f"{prefix}tokens/{name}"] = folder.tokens
        if folder.tokens:
            scalars[f"{prefix}loss/{name}"] = folder.loss
            scalars[f"{prefix}acc/{name}"] = folder.acc
            scalars[f"{prefix}perplexity/{name}"] = perplexity(folder.loss)
    return scalars


def perplexity(cross_entropy: float) -> float:
    """exp(cross_entropy), inf if that is too large for a float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
