"""Everything a run consists of, put together once, before the first step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from internlm_lite.config.schema import Config
from internlm_lite.data.loader import TrainingData, ValidationData, open_training_data, open_validation_data
from internlm_lite.faults.watchdog import Watchdog, unwatched
from internlm_lite.layers.flash import AttentionBackend, choose_backend
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.models.initialise import initialise
from internlm_lite.models.stages import Stages, build_stages, units_of
from internlm_lite.monitor.console import heartbeat
from internlm_lite.monitor.jsonl import has_ended
from internlm_lite.optim.zero import HybridZeroOptimizer
from internlm_lite.pipeline.engine import Engine, HiddenShape, OneRank, Pipeline
from internlm_lite.runtime.device import torch_dtype
from internlm_lite.train.reporter import Reporter
from internlm_lite.train.samples import Samples
from internlm_lite.train.save_folders import SaveFolders
from internlm_lite.train.saving import Saving
from internlm_lite.train.sinks import open_sinks
from internlm_lite.train.state import TrainState
from internlm_lite.units import human_count

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class Run:
    """The parts of a run; `start` is where it begins or goes on from."""

    config: Config
    mesh: Mesh
    folder: Path
    stages: Stages
    engine: Engine
    optimizer: HybridZeroOptimizer
    data: TrainingData
    folder_tokens: dict[str, int]
    """Of each training folder, once through."""
    valid: ValidationData | None
    reporter: Reporter
    samples: Samples
    saving: Saving
    start: TrainState
    watchdog: Watchdog
    trace_folder: Path | None
    """Where a trace of a few steps goes; None: no tracing."""


def build_run(
    config: Config,
    mesh: Mesh,
    folder: Path,
    resume: str,
    terminal: bool,
    trace: bool = False,
    save_folders: SaveFolders | None = None,
    watchdog: Watchdog | None = None,
) -> Run:
    """Open the data, build and initialise the model, restore a checkpoint. Collective.

    `save_folders`: those of `config`, where they are taken already. A `folder` whose run has ended is not written to if
    there is nothing left to do. Raises DataError, CheckpointError or StorageError before any training is done.
    """
    save_folders = save_folders or SaveFolders(config, mesh)
    watchdog = watchdog or unwatched(mesh.rank)
    watchdog.enter("building")
    dp, vocab_size = mesh.dp, config.model.vocab_size
    with heartbeat("opening the training data"):
        data = open_training_data(config.data, vocab_size, dp.rank, dp.size, config.seed)
        valid = None
        if config.data.valid_every:
            valid = open_validation_data(config.data, vocab_size, dp.rank, dp.size, config.seed)
    dtype = torch_dtype(config.model.dtype)
    backend = choose_backend(config.model, mesh.device)
    with heartbeat("building the model"):
        stages = build_stages(config, mesh, backend)
        initialise(nn.ModuleList(stages.values()), config.seed)
        optimizer = HybridZeroOptimizer(units_of(stages), config, mesh, dtype)
        engine = build_engine(config, mesh, stages)
    _announce(config, mesh, data, backend, optimizer)
    reporter = Reporter(config, mesh, data.folders)
    samples = Samples(config, mesh, stages, optimizer, reporter)
    saving = Saving(config, mesh, save_folders, optimizer, reporter, data.fingerprint, folder.name)
    with heartbeat("loading a checkpoint"):
        start = saving.restore(resume)
    nothing_to_say = start.step >= config.data.total_steps and has_ended(folder / "events.jsonl")
    if mesh.is_main and not nothing_to_say:
        reporter.open_sinks(lambda done: open_sinks(folder, config, done, terminal), start.step)
    return Run(
        config=config,
        mesh=mesh,
        folder=folder,
        stages=stages,
        engine=engine,
        optimizer=optimizer,
        data=data,
        folder_tokens={part.name: part.tokens for part in data.packed},
        valid=valid,
        reporter=reporter,
        samples=samples,
        saving=saving,
        start=start,
        watchdog=watchdog,
        trace_folder=folder if trace else None,
    )


def build_engine(config: Config, mesh: Mesh, stages: Stages) -> Engine:
    """What runs micro-batches through the stages of this rank and its neighbours."""
    if mesh.pp.size == 1:
        return OneRank()
    stage = next(iter(stages.values()))
    return Pipeline(
        stages,
        mesh.pp,
        schedule=config.schedule,
        shape=HiddenShape(
            rows=stage.tp_ctx.rows(config.data.micro_bsz * config.data.seq_len),
            hidden_size=config.model.hidden_size,
            dtype=stage.tp_ctx.dtype,
            device=mesh.device,
        ),
        early_receive=config.parallel.pipeline.interleaved_overlap,
        pop_deferred=stage.tp_ctx.weight_grads.pop_deferred,
    )


def _announce(
    config: Config, mesh: Mesh, data: TrainingData, backend: AttentionBackend, optimizer: HybridZeroOptimizer
) -> None:
    logger.info(f"Number of elements on ranks: {optimizer.elements_on_zero_ranks()}, rank:{mesh.rank}")
    if mesh.is_main:
        tokens = config.data.micro_num * config.data.micro_bsz * config.data.seq_len * mesh.dp.size
        logger.info(f"attention: {backend.value}, dtype: {config.model.dtype}, torch {torch.__version__}")
        logger.info(
            f"{human_count(data.total_tokens)} training tokens in folders {', '.join(data.folders)}; "
            f"{tokens} tokens a step"
        )
        if not config.ckpt.enable_save_ckpt:
            logger.warning("ckpt.enable_save_ckpt=False: nothing that is trained will be kept")
