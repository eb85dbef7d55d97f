"""Everything a run consists of, put together once, before the first step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from internlm_lite.config.schema import Config
from internlm_lite.data.loader import TrainingData, ValidationData, open_training_data, open_validation_data
from internlm_lite.faults.watchdog import Watchdog, unwatched
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.monitor.alert_monitor import AlertMonitor
from internlm_lite.monitor.console import Console, heartbeat
from internlm_lite.monitor.disk_usage import written_folders
from internlm_lite.monitor.jsonl import has_ended
from internlm_lite.monitor.packages import writes_tensorboard
from internlm_lite.monitor.record import Sink
from internlm_lite.monitor.sinks import FanOut, run_files
from internlm_lite.train.checkpoints import Checkpoints, Contents
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.samples import Samples
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer
from internlm_lite.units import human_count

logger = logging.getLogger("internlm_lite")

SinkFactory = Callable[[Path, Config], Sink | None]
"""Makes a sink for a run folder, or None where the config does not ask for it. The sink's methods must be quick."""


@dataclass(frozen=True)
class Run:
    """The parts of a run; `start` is the state that it begins or resumes from."""

    config: Config
    mesh: Mesh
    folder: Path
    trainer: Trainer
    data: TrainingData
    valid: ValidationData | None
    reporter: Reporter
    samples: Samples
    checkpoints: Checkpoints
    start: TrainState
    watchdog: Watchdog


@dataclass(frozen=True)
class Surroundings:
    """What a job provides to its run. Nothing of it changes what is trained."""

    checkpoints: Checkpoints | None = None
    """None: those of the config."""
    watchdog: Watchdog | None = None
    terminal: bool = False
    """Someone looks at the output: the console shows colours and the steps to go."""
    sinks: Mapping[str, SinkFactory] = field(default_factory=dict)
    """More sinks by name; closed last, the first of them after all others."""


def build_run(
    config: Config, mesh: Mesh, folder: Path, resume: str = "auto", around: Surroundings = Surroundings()
) -> Run:
    """Open the data, build and initialise the model, restore a checkpoint. Collective.

    `resume`: auto, none or a path. A `folder` whose run has ended is not written to if there is nothing left to do.
    Raises DataError, CheckpointError or StorageError before any training is done.
    """
    checkpoints = around.checkpoints or Checkpoints(config, mesh)
    watchdog = around.watchdog or unwatched(mesh.rank)
    watchdog.enter("building")
    dp, vocab_size = mesh.dp, config.model.vocab_size
    with heartbeat("opening the training data"):
        data = open_training_data(config.data, vocab_size, dp.rank, dp.size, config.seed)
        valid = None
        if config.data.valid_every:
            valid = open_validation_data(config.data, vocab_size, dp.rank, dp.size, config.seed)
    with heartbeat("building the model"):
        trainer = Trainer(config, mesh, data.folders)
    tokens = config.data.micro_num * config.data.micro_bsz * config.data.seq_len * dp.size
    _log_facts(config, data, trainer, tokens)
    reporter = Reporter(config, mesh, trainer)
    samples = Samples(config, trainer, reporter)
    checkpoints.attach(Contents(trainer, reporter, data.fingerprint, folder.name, tokens, intended_batch_tokens=tokens))
    with heartbeat("loading a checkpoint"):
        start = checkpoints.restore(resume)
    nothing_to_report = start.step >= config.data.total_steps and has_ended(folder / "events.jsonl")
    if mesh.is_main and not nothing_to_report:
        reporter.open_sinks(partial(open_sinks, folder, config, around), start.step)
    return Run(config, mesh, folder, trainer, data, valid, reporter, samples, checkpoints, start, watchdog)


def open_sinks(folder: Path, config: Config, around: Surroundings, done: int) -> FanOut:
    """On rank 0, for a run that has done `done` steps and goes on in `folder`. Its packages are checked already."""
    monitor, ckpt, total = config.monitor, config.ckpt, config.data.total_steps
    save_every = [n for n in (ckpt.checkpoint_every, ckpt.oss_snapshot_freq) if n and ckpt.enable_save_ckpt]
    made = {name: make(folder, config) for name, make in around.sinks.items()}
    direct = {name: sink for name, sink in made.items() if sink is not None}
    direct |= {**run_files(folder), "the console": Console(total, around.terminal, save_every, done)}
    fan_out = FanOut(direct, _queued(folder, config, done))
    title = f"{config.JOB_NAME} {folder.name}"
    fan_out.add("alerts", AlertMonitor(monitor.alerts, total, written_folders(folder, ckpt), title, fan_out.event))
    return fan_out


def _queued(folder: Path, config: Config, done: int) -> dict[str, Callable[[], Sink]]:
    """Their packages are imported in the thread that makes them."""
    monitor = config.monitor

    def tensorboard() -> Sink:
        from internlm_lite.monitor.tensorboard import TensorBoard

        return TensorBoard(folder / "tensorboard", done)

    def wandb() -> Sink:
        from internlm_lite.monitor.wandb import Wandb

        assert monitor.wandb is not None
        return Wandb(folder, config, monitor.wandb)

    wanted = {"TensorBoard": (tensorboard, writes_tensorboard(monitor)), "wandb": (wandb, monitor.wandb is not None)}
    return {name: make for name, (make, is_wanted) in wanted.items() if is_wanted}


def _log_facts(config: Config, data: TrainingData, trainer: Trainer, batch_tokens: int) -> None:
    mesh = trainer.mesh
    logger.info(f"Number of elements on ranks: {trainer.optimizer.elements_on_zero_ranks()}, rank:{mesh.rank}")
    if mesh.is_main:
        logger.info(f"attention: {trainer.backend.value}, dtype: {config.model.dtype}, torch {torch.__version__}")
        logger.info(
            f"{human_count(data.total_tokens)} training tokens in folders {', '.join(data.folders)}; "
            f"{batch_tokens} tokens a step"
        )
        if not config.ckpt.enable_save_ckpt:
            logger.warning("ckpt.enable_save_ckpt=False: nothing that is trained will be kept")
