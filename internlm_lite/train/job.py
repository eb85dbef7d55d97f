"""One process of a training job, from the checked config to its exit code.

    device, world -> mesh -> save folders -> what to resume, in which run folder -> build -> train -> end
    runtime/         mesh/   checkpoints.py                                         build.py loop.py

`Trainer.step` in trainer.py is one step, from the batch to the update.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from internlm_lite.checkpoint.storage.run_lock import LEASE_SECONDS
from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.masking import masked
from internlm_lite.config.render_config import origin_rows
from internlm_lite.config.schema import Config
from internlm_lite.errors import STOPPED, PeerLostError, StorageError
from internlm_lite.faults.failure import clear_failures, read_failures
from internlm_lite.faults.heartbeats import Limits
from internlm_lite.faults.signals import StopSignals
from internlm_lite.faults.watchdog import Watchdog
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.monitor.jsonl import EventsFile, has_ended, next_segment
from internlm_lite.monitor.packages import check_packages
from internlm_lite.monitor.sinks import SinkFactory
from internlm_lite.optim.deepspeed_settings import require_deepspeed
from internlm_lite.runtime import folder as run_folders
from internlm_lite.runtime.device import apply_numerics, bind_device, device_name
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.runtime.log import setup_logging
from internlm_lite.runtime.start import announce_layout, end_process, start_world, stop_world
from internlm_lite.runtime.torchrun import report_to_agent
from internlm_lite.train.build import Run, RunServices, build_run
from internlm_lite.train.changes import LastRun, keep_global_batch
from internlm_lite.train.checkpoints import Checkpoints
from internlm_lite.train.evaluation import CheckpointEvaluation, evaluate_checkpoint, evaluate_only, without_saves
from internlm_lite.train.failure_handler import FailureHandler, code_of
from internlm_lite.train.loop import TrainingEnd, train

logger = logging.getLogger("internlm_lite")

_LONG_PHASES = ("starting", "building", "loading", "saving", "evaluation", "samples", "ending")
_LONG_FACTOR = 4
"""A long phase may be without progress for this many times --timeout, the limit of other phases."""
LOCKING = "taking the save folders"
"""A phase with a longer limit than the long ones: rank 0 may have to wait for a dead run's lock to expire."""
_GRACE_SECONDS = 30.0
MAX_WHY = 2000
"""Characters of an error that events.jsonl keeps; the log has all."""


@dataclass(frozen=True)
class Options:
    """Command-line options besides the config."""

    resume: str | None
    """One of "auto", "none", a step, a path; None: ckpt.auto_resume decides."""
    device: str
    run_dir: Path
    timeout_seconds: float
    log_style: str
    command: tuple[str, ...]
    profiling: bool
    sinks: Mapping[str, SinkFactory] = field(default_factory=dict)
    """See `build.RunServices`."""
    eval_only: bool = False
    """Evaluate a checkpoint instead of training."""
    evaluation: CheckpointEvaluation | None = None
    """Likewise, with a config of `config_to_evaluate`."""


@dataclass(frozen=True)
class Job:
    """The context of a job once all ranks are connected and hold the save folders."""

    loaded: LoadedConfig
    dist_env: DistEnv
    options: Options
    mesh: Mesh
    checkpoints: Checkpoints
    failures: FailureHandler
    agents: tuple[str, ...]
    """Ids of the torchrun agents of all ranks."""

    @property
    def config(self) -> Config:
        return self.loaded.config


@dataclass(frozen=True)
class StartPlan:
    """Where the run starts from and where it writes to."""

    resume: str
    """One of "auto", "none", a step, a path."""
    last: LastRun | None
    """The run that wrote the newest checkpoint of the save folders, with `resume` "auto"."""
    folder: Path
    folder_if_failed: Path
    """Instead of `folder` until the checkpoint of an earlier start is loaded: a start that fails must not touch it."""
    done: bool
    """The run in `folder` has done all steps: do not write to `folder`."""


def run_job(loaded: LoadedConfig, dist_env: DistEnv, options: Options) -> NoReturn:
    """Train, then exit: 0 when the last step is done, STOPPED after a stop (0 under a supervisor), else the error's
    code. `loaded` has passed `check_config` for this world."""
    setup_logging(dist_env, None, options.log_style)
    failures = FailureHandler(dist_env)
    if options.eval_only:
        loaded = replace(loaded, config=without_saves(loaded.config))
    try:
        with report_to_agent(dist_env.error_file):
            code = _run(loaded, dist_env, options, failures)
    except (Exception, KeyboardInterrupt, SystemExit) as error:  # noqa: BLE001  the exit code says which
        failures.log(error)
        code = code_of(error)
    end_process(code, dist_env.world_size)


def _run(loaded: LoadedConfig, dist_env: DistEnv, options: Options, failures: FailureHandler) -> int:
    """The phases listed in the module's docstring; returns the exit code."""
    config, timeout = loaded.config, options.timeout_seconds
    if dist_env.is_main:
        logger.log(logging.WARNING if dist_env.idle_tasks else logging.INFO, dist_env.why)
        for note in loaded.notes:
            logger.info(note)
    check_packages(config.monitor)
    limits = limits_of(timeout)
    # Longer than the watchdog's limit of any phase, because the watchdog can name the missing rank.
    collectives = timedelta(seconds=max(limits.of.values()) + _GRACE_SECONDS)
    device = bind_device(dist_env, options.device)
    apply_numerics(config, device, dist_env)
    require_deepspeed(config, device)
    store = start_world(
        dist_env, device, timedelta(seconds=timeout), collectives, _fingerprint(loaded, options, device)
    )
    watchdog = failures.watchdog = Watchdog(
        dist_env.rank,
        dist_env.world_size,
        store,
        limits,
        failures.hang,
        dist_env.hostname,
        agent_store=dist_env.agent_store,
    )
    with StopSignals() as signals, watchdog:
        parallel = config.parallel
        sizes = sizes_of(
            dist_env.world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1, parallel.context.size
        )
        mesh = build_mesh(sizes, dist_env.rank, device, collectives)
        announce_layout(sizes.dp, sizes.pp, sizes.tp, sizes.cp)
        # Before anything is written: if another run holds the save folders, the run folder may be that run's, too.
        with watchdog.inside(LOCKING):
            checkpoints = Checkpoints(config, mesh, timeout)
        try:
            agents = {str(agent) for agent in comm.gather_objects(dist_env.agent, mesh.world) if agent}
            job = Job(loaded, dist_env, options, mesh, checkpoints, failures, tuple(sorted(agents)))
            services, stopped_by = RunServices(checkpoints=checkpoints, watchdog=watchdog), ""
            if options.evaluation is not None:
                evaluate_checkpoint(config, mesh, options.evaluation, services)
            elif options.eval_only:
                evaluate_only(config, mesh, options.resume, services)
            else:
                stopped_by = _train(job, _plan(job), signals).stopped_by
        finally:
            watchdog.enter("ending")
            checkpoints.close(wait=False)
        try:
            stop_world()
        except PeerLostError as error:
            failures.failed(error)
            raise
        return STOPPED if stopped_by and not dist_env.supervised else 0


def limits_of(timeout_seconds: float) -> Limits:
    """The watchdog's limits: seconds that a rank may be in each phase without progress."""
    long = _LONG_FACTOR * timeout_seconds
    return Limits(timeout_seconds, {**dict.fromkeys(_LONG_PHASES, long), LOCKING: long + 2 * LEASE_SECONDS})


def _fingerprint(loaded: LoadedConfig, options: Options, device: torch.device) -> dict[str, str]:
    """Values that must be equal on all ranks, to refuse ranks of another job, with stale code or other options."""
    return {
        "internlm_lite's code": run_folders.code_digest(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "device": device.type,
        "--resume": options.resume or "not given",
        "--timeout": f"{options.timeout_seconds:g}",
        "--eval-only": str(options.eval_only),
        "--weights": str(options.evaluation and options.evaluation.weights),
        **{row["key"]: repr(row["value"]) for row in origin_rows(loaded)},
    }


def _plan(job: Job) -> StartPlan:
    """The plan of rank 0, on all ranks. Collective."""
    restarted = any(comm.gather_objects(job.dist_env.attempt, job.mesh.world))
    return on_main(job.mesh, lambda: _plan_on_main(job, restarted=restarted))


def _plan_on_main(job: Job, *, restarted: bool) -> StartPlan:
    """Resuming from the save folders continues in the run folder of their newest checkpoint; else it is a new one."""
    config, root, now = job.config, job.options.run_dir, datetime.now().astimezone()
    resume = _resume_how(job, restarted=restarted)
    last = job.checkpoints.last_run() if resume == "auto" else None
    folder = run_folders.find_run_folder(root, config.JOB_NAME, last.folder) if last else None
    if last is None or folder is None:
        new = run_folders.create_run_folder(root, config.JOB_NAME, now)
        return StartPlan(resume, last, new, new, done=False)
    done = last.step >= config.data.total_steps and has_ended(folder / "events.jsonl")
    return StartPlan(resume, last, folder, run_folders.failed_start_folder(folder, now), done)


def _resume_how(job: Job, *, restarted: bool) -> str:
    """Where to resume: "auto", "none" or a path. "auto" for a job that its launcher restarts, if it has a checkpoint.

    With torchrun, the newest checkpoint is the job's own if one of its agents started the run that wrote it; otherwise
    `restarted` (the launcher has counted a restart) decides.
    """
    wanted = job.options.resume or ("auto" if job.config.ckpt.auto_resume else "none")
    last = job.checkpoints.last_run() if wanted != "auto" else None
    folder = run_folders.find_run_folder(job.options.run_dir, job.config.JOB_NAME, last.folder) if last else None
    if folder is None:
        return wanted
    ours = not run_folders.agents_of(folder).isdisjoint(job.agents) if job.agents else restarted
    return "auto" if ours else wanted


def _train(job: Job, plan: StartPlan, signals: StopSignals) -> TrainingEnd:
    """Build the run and train until the end; no training if no steps are left. Collective."""
    run, finished = None, False
    try:
        if plan.folder_if_failed == plan.folder:
            _open_run_folder(job, plan.folder)
        else:
            job.failures.write_to(plan.folder_if_failed)
        run = _build(job, plan)
        # A run that is done goes on if the newest checkpoint was damaged: repeat some steps.
        if job.failures.folder != plan.folder and (not plan.done or run.start.step < run.config.data.total_steps):
            _open_run_folder(job, plan.folder)
        is_open = job.failures.folder == plan.folder
        trace_folder = plan.folder if job.options.profiling else None
        ended = train(run, signals, trace_folder) if is_open else TrainingEnd(run.start)
        finished = True
    except BaseException as error:
        if job.failures.folder != plan.folder:
            _describe_failed_start(job, plan.folder_if_failed)
        job.failures.failed(error)
        _report_failure(job, run, error)
        raise
    finally:
        if run is not None:
            job.failures.watchdog.enter("ending")
            job.checkpoints.close(wait=finished)
            run.reporter.close()
    if job.mesh.is_main:
        _log_end(run, ended)
    return ended


def _build(job: Job, plan: StartPlan) -> Run:
    services = RunServices(
        checkpoints=job.checkpoints,
        watchdog=job.failures.watchdog,
        terminal=sys.stdout.isatty() and job.mesh.is_main,
        sinks=job.options.sinks,
    )
    config = keep_global_batch(job.config, plan.last, job.mesh.dp.size)
    return build_run(config, job.mesh, plan.folder, plan.resume, services)


def _open_run_folder(job: Job, folder: Path) -> None:
    """Record this start in the run folder, and log there from now on. Collective."""
    on_main(job.mesh, lambda: _describe_start(job, folder))
    job.failures.write_to(folder)
    setup_logging(job.dist_env, folder, job.options.log_style)


def _describe_failed_start(job: Job, folder: Path) -> None:
    """Not collective."""
    with suppress(StorageError):
        setup_logging(job.dist_env, folder, job.options.log_style)
        if job.mesh.is_main:
            _write_start(job, folder)
            logger.error(f"this start failed before it went on; everything about it is in {folder}")


def _describe_start(job: Job, folder: Path) -> None:
    clear_failures(folder)
    run_folders.point_latest(folder.parent, folder.name)
    _write_start(job, folder)


def _write_start(job: Job, folder: Path) -> None:
    now, device = datetime.now().astimezone(), device_name(job.mesh.device)
    run_folders.write_start(
        folder, job.loaded, run_folders.environment(job.dist_env, job.options.command, device, now, job.agents)
    )


def _report_failure(job: Job, run: Run | None, error: BaseException) -> None:
    """Rank 0 writes the event "failed": through the run's sinks, or to events.jsonl before there are sinks."""
    folder = job.failures.folder
    if folder is None or not job.mesh.is_main:
        return
    if run is not None:
        run.reporter.event("failed", **_failure(error, folder))
        return
    file = folder / "events.jsonl"
    with suppress(OSError):
        events = EventsFile(file, next_segment(folder / "metrics.jsonl", file))
        events.event("failed", _failure(error, folder))
        events.close()


def _failure(error: BaseException, folder: Path) -> dict[str, Any]:
    """The event's facts: the first failure on record, else this rank's error (rank 0's)."""
    if isinstance(error, KeyboardInterrupt):
        return {"why": "interrupted", "rank": 0}
    known = [(failure.rank, f"{failure.kind}: {failure.message}") for failure in read_failures(folder)]
    rank, why = known[0] if known else (0, f"{type(error).__name__}: {error}")
    return {"why": str(masked(why))[:MAX_WHY], "rank": rank}


def _log_end(run: Run, ended: TrainingEnd) -> None:
    total = run.config.data.total_steps
    if ended.stopped_by:
        saved = "nothing saved, because ckpt.enable_save_ckpt=False"
        if run.config.ckpt.enable_save_ckpt:
            saved = "saved; started again, the run goes on from there"
        logger.warning(
            f"stopped by {ended.stopped_by} after {ended.state.step} of {total} steps: {saved}. Everything about this "
            f"run is in {run.folder}"
        )
        return
    if run.start.step >= total:
        logger.warning(
            f"nothing to do: the checkpoint stands at step {run.start.step} of {total}; raise data.total_steps, or "
            "train from the beginning with --resume none"
        )
    logger.info(f"done: {ended.state.step} steps; everything about this run is in {run.folder}")
