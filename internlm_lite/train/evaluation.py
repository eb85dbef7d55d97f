"""The loss on validation data, and on some batches of the training data. Changes nothing that training depends on."""

from __future__ import annotations

import logging
from pathlib import Path

from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingSample
from internlm_lite.errors import CheckpointError
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.monitor.record import ValidationRecord
from internlm_lite.monitor.scalars import perplexity
from internlm_lite.train.build import Run, RunServices, load_run
from internlm_lite.train.train_state import TrainState

logger = logging.getLogger("internlm_lite")


def evaluate(run: Run, state: TrainState) -> ValidationRecord:
    """Figures of the model after `state`, and of the averaged weights if there are any. Collective; waits for them."""
    assert run.valid is not None, "an evaluation is due only with validation data"
    found = run.trainer.evaluate(run.valid, run.watchdog.report_progress)
    train_loss, n_batches = None, run.config.data.valid_train_batches
    if n_batches:
        sample = TrainingSample(run.data, run.valid.micro_num, n_batches)
        train_loss = run.trainer.evaluate(sample, run.watchdog.report_progress).cross_entropy
    return ValidationRecord(
        step=state.step - 1,
        loss=found.cross_entropy,
        acc=found.accuracy,
        perplexity=perplexity(found.cross_entropy),
        folders=found.folders,
        train_loss=train_loss,
        ema=_of_averages(run),
    )


def _of_averages(run: Run) -> dict[str, float] | None:
    """See `ValidationRecord.ema`."""
    if run.trainer.optimizer.average is None or run.valid is None:
        return None
    with run.trainer.optimizer.averaged():
        found = run.trainer.evaluate(run.valid, run.watchdog.report_progress)
    return {"loss": found.cross_entropy, "acc": found.accuracy, "perplexity": perplexity(found.cross_entropy)}


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
    found = evaluate(run, run.start)
    if mesh.is_main:
        logger.info(f"{source or 'untrained weights'}: {found}")
