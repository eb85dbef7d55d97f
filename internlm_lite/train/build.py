"""Builds all parts of a run before its first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch

from internlm_lite.checkpoint.format.weight_roles import Weights
from internlm_lite.config.batch_sizes import with_warmup_steps
from internlm_lite.config.schema import Config
from internlm_lite.data.data_loader import TrainingData, ValidationData, open_training_data, open_validation_data
from internlm_lite.data.demand import check_caps, with_total_steps
from internlm_lite.evaluate.task_suite import TaskSuite
from internlm_lite.faults.watchdog import Watchdog, unwatched
from internlm_lite.mesh.layout import Parameter
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.stages import WholeModel, meta_model, whole_model
from internlm_lite.monitor.console import heartbeat
from internlm_lite.monitor.jsonl import has_ended
from internlm_lite.monitor.sinks import SinkFactory, open_sinks
from internlm_lite.optim.groups import check_patterns, group_lines
from internlm_lite.optim.planned_schedule import write_schedule
from internlm_lite.train.checkpoints import Checkpoints, Contents
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.samples import Samples
from internlm_lite.train.train_state import TrainState
from internlm_lite.train.trainer import Trainer
from internlm_lite.units import human_count

logger = logging.getLogger("internlm_lite")
_LOW_IS_BEST = ("loss", "perplexity", "bits_per_byte")
"""Ends of the names of figures of which less is better."""


@dataclass(frozen=True)
class Run:
    """The parts of a run. `start`: the state to begin or resume from; `valid`: None without validation."""

    config: Config
    mesh: Mesh
    folder: Path
    trainer: Trainer
    data: TrainingData
    valid: ValidationData | None
    model: WholeModel
    """The stages, for generation and tasks."""
    tasks: TaskSuite | None
    reporter: Reporter
    samples: Samples
    checkpoints: Checkpoints
    start: TrainState
    watchdog: Watchdog

    def more_is_better(self, figure: str) -> bool:
        """Whether a checkpoint is better if this figure of an evaluation is higher."""
        said = {} if self.tasks is None else self.tasks.higher_is_better
        return said.get(figure, not figure.rpartition("/")[2].endswith(_LOW_IS_BEST))


@dataclass(frozen=True)
class RunServices:
    """What a job passes to its run. None of it changes the training."""

    checkpoints: Checkpoints | None = None
    """None: opened from the config."""
    watchdog: Watchdog | None = None
    terminal: bool = False
    """The output is a terminal: the console shows colours and the remaining steps."""
    weights: Weights = "model"
    """What of ckpt.load_model_only_folder is loaded."""
    sinks: Mapping[str, SinkFactory] = field(default_factory=dict)
    """Additional sinks by name; closed after all others, in reverse order."""


def build_run(
    config: Config, mesh: Mesh, folder: Path, resume: str = "auto", services: RunServices = RunServices()
) -> Run:
    """`load_run`, with sinks in `folder`, unless the run there has ended and no steps are left. Collective."""
    run = load_run(config, mesh, folder, resume, services)
    if not mesh.is_main:
        return run
    if not config.ckpt.enable_save_ckpt:
        logger.warning("ckpt.enable_save_ckpt=False: nothing that is trained will be kept")
    if run.start.step < run.config.data.total_steps or not has_ended(folder / "events.jsonl"):
        write_schedule(folder, run.config, mesh.dp.size)
        make = partial(open_sinks, folder, run.config, services.sinks, terminal=services.terminal)
        run.reporter.open_sinks(make, run.start.step)
    return run


def load_run(config: Config, mesh: Mesh, folder: Path, resume: str, services: RunServices) -> Run:
    """Open the data, build the model, restore a checkpoint or draw the weights. Collective; writes nothing.

    `resume`: "auto", "none", a step or a path. Raises DataError, CheckpointError or StorageError.
    """
    checkpoints = services.checkpoints or Checkpoints(config, mesh)
    watchdog = services.watchdog or unwatched(mesh.rank)
    watchdog.enter("building")
    dp, vocab_size = mesh.dp, config.model.vocab_sizes
    with heartbeat("opening the training data"):
        data = open_training_data(config.data, vocab_size, dp.rank, dp.size, config.seed, config.stages)
        config = with_warmup_steps(with_total_steps(config, data), dp.size)
        check_caps(config.data, data)
        valid = None
        if config.data.valid_every:
            valid = open_validation_data(config.data, vocab_size, dp.rank, dp.size, config.seed)
    with heartbeat("opening the tasks"):
        tasks = TaskSuite(config, mesh) if config.evaluation.tasks else None
    with heartbeat("building the model"):
        groups = _group_lines(config)
        trainer = Trainer(config, mesh, data.folders, draw_weights=False)  # `restore` loads or draws them
    tokens = config.data.micro_num * config.data.micro_bsz * config.data.seq_len * dp.size
    _log_facts(config, data, trainer, tokens)
    if mesh.is_main:
        for line in groups:
            logger.info(line)
    reporter = Reporter(config, mesh, trainer)
    model = whole_model(config, mesh, trainer.stages)
    samples = Samples(config, trainer, reporter, model)
    checkpoints.adopt_lengths(config)
    checkpoints.attach(Contents(trainer, reporter, data.fingerprint, folder.name, tokens, intended_batch_tokens=tokens))
    with heartbeat("loading a checkpoint, or drawing the weights"):
        start = checkpoints.restore(resume, services.weights)
    trainer.enter_stage(data.stage_before(start.position).number)
    return Run(
        config=config,
        mesh=mesh,
        folder=folder,
        trainer=trainer,
        data=data,
        valid=valid,
        model=model,
        tasks=tasks,
        reporter=reporter,
        samples=samples,
        checkpoints=checkpoints,
        start=start,
        watchdog=watchdog,
    )


def _group_lines(config: Config) -> list[str]:
    """What each parameter group has, where the config names some. Raises ConfigError for a pattern without one."""
    if not config.optimizer.groups:
        return []
    params = [cast(Parameter, param) for param in meta_model(config.model).parameters()]
    check_patterns(config, [param.shard_spec.name for param in params])
    return group_lines(config, params)


def _log_facts(config: Config, data: TrainingData, trainer: Trainer, batch_tokens: int) -> None:
    mesh = trainer.mesh
    logger.info(f"Number of elements on ranks: {trainer.optimizer.elements_on_zero_ranks()}, rank:{mesh.rank}")
    if mesh.is_main:
        engine, shared = config.engine, f"ZeRO stage {config.parallel.zero_stage}"
        if engine.name == "deepspeed":
            shared = f"DeepSpeed's ZeRO stage {engine.stage}, offload: {engine.offload}"
        dtype = f"dtype: {config.model.dtype}, torch {torch.__version__}"
        logger.info(f"attention: {trainer.backend.value}, {dtype}, {shared}")
        logger.info(
            f"{human_count(data.total_tokens)} training tokens in folders {', '.join(data.folders)}; "
            f"{batch_tokens} tokens a step"
        )
