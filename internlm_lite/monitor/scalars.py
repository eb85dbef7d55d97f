"""The figures of a run under the names that TensorBoard and wandb show: train/loss, lr, loss/<folder>, ..."""

from __future__ import annotations

import math
from collections.abc import Mapping

from internlm_lite.monitor.record import FolderFigures, StepRecord, ValidationRecord

FOLDER_FIGURES = ("loss", "acc", "perplexity", "tokens")
"""Each has one series a folder: loss/code, loss/docs, ..."""


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Name -> figure of a step line. A folder without tokens, and what is not known, is left out."""
    scalars: dict[str, float | None] = {
        "train/loss": record.loss,
        "train/loss_from_metric": record.loss_from_metric,
        "train/acc": record.acc,
        "train/perplexity": record.perplexity,
        "train/num_consumed_tokens": record.num_consumed_tokens,
        "lr": record.lr,
        "loss_scale": record.loss_scale,
        "adam_beta2": record.adam_beta2,
        "inf_nan_skip_batches": record.inf_nan_skip_batches,
        **{f"grad_norm/{name}": norm for name, norm in record.grad_norm.items()},
        "tgs": record.speed.tgs,
        "tflops": record.tflops,
        "mfu": record.mfu,
        "pack_fill": record.pack_fill,
        "memory_bytes": record.memory_bytes,
        "fwd_bwd_time": record.fwd_bwd_time,
        **_folders(record.folders, ""),
    }
    return {name: value for name, value in scalars.items() if value is not None}


def validation_scalars(record: ValidationRecord) -> dict[str, float]:
    """Name -> figure of an evaluation: valid/loss, val_loss/<folder>, ..."""
    return {
        "valid/loss": record.loss,
        "valid/acc": record.acc,
        "valid/perplexity": record.perplexity,
        **_folders(record.folders, "val_"),
    }


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
    """exp(cross_entropy), inf where that has no float."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf
