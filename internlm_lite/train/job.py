"""One process of a training job, from the checked config to its exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch

from internlm_lite.checkpoint.storage.run_lock import LEASE_SECONDS
from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.masking import masked
from internlm_lite.config.render_config import origin_rows
from internlm_lite.config.schema import Config
from internlm_lite.errors import STOPPED, InternLMError, PeerLostError
from internlm_lite.faults.beats import Limits
from internlm_lite.faults.failure import clear_failures, read_failures
from internlm_lite.faults.signals import StopSignals
from internlm_lite.faults.watchdog import Watchdog
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_main
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.monitor.jsonl import EventsFile, has_ended, next_segment
from internlm_lite.monitor.packages import check_packages
from internlm_lite.runtime.device import apply_numerics, bind_device, device_name
from internlm_lite.runtime.folder import (
    agents_of,
    code_digest,
    create_run_folder,
    environment,
    find_run_folder,
    point_latest,
    write_start,
)
from internlm_lite.runtime.log import setup_logging
from internlm_lite.runtime.place import Place
from internlm_lite.runtime.start import announce_layout, end_process, start_world, stop_world
from internlm_lite.runtime.torchrun import agent_told
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.elastic import keep_global_batch
from internlm_lite.train.ending import Ending, code_of
from internlm_lite.train.loop import Ended, train
from internlm_lite.train.save_folders import LastRun, SaveFolders

logger = logging.getLogger("internlm_lite")

_LONG_PHASES = ("starting", "building", "loading", "saving", "evaluation", "samples", "ending")
_PATIENCE = 4
"""Such a phase may take so many times as long as others without progress (--timeout)."""
TAKING = "taking the save folders"
"""A phase that may take longer still: rank 0 may have to watch the lock of a dead run."""
_GRACE_SECONDS = 30.0
MOST_OF_WHY = 2000
"""Characters of an error that go into events.jsonl; the log has all."""


@dataclass(frozen=True)
class Options:
    """What the command line says besides the config."""

    resume: str | None
    """auto, none or a path; None: as ckpt.auto_resume says."""
    device: str
    run_dir: Path
    timeout_seconds: float
    log_style: str
    command: tuple[str, ...]
    profiling: bool


def run_job(loaded: LoadedConfig, place: Place, options: Options) -> NoReturn:
    """Train, and end this process: 0 when the last step is done, else the error's exit code.

    `loaded` has passed `check_config` for this world.
    """
    setup_logging(place, None, options.log_style)
    ending = Ending(place)
    try:
        with agent_told(place.error_file):
            code = _run(loaded, place, options, ending)
    except InternLMError as error:
        if not ending.told_elsewhere:
            logger.error(f"{type(error).__name__}: {error}")
        code = code_of(error)
    except KeyboardInterrupt as interrupt:
        logger.error("interrupted; started again, the run goes on from its newest checkpoint if it has written one")
        code = code_of(interrupt)
    except SystemExit as leave:
        logger.error(f"rank {place.rank} failed: something called sys.exit({leave.code!r}) in the middle of the run")
        code = code_of(leave)
    except Exception as error:
        logger.exception(f"rank {place.rank} failed")
        code = code_of(error)
    end_process(code, place.world_size)


def _run(loaded: LoadedConfig, place: Place, options: Options, ending: Ending) -> int:
    config = loaded.config
    if place.is_main:
        logger.log(logging.WARNING if place.idle_tasks else logging.INFO, place.why)
        for note in loaded.notes:
            logger.info(note)
    check_packages(config.monitor)
    timeout = options.timeout_seconds
    limits = limits_of(timeout)
    # Longer than the watchdog waits in any phase: it can name who is missing, a collective cannot.
    collectives = timedelta(seconds=max(limits.of.values()) + _GRACE_SECONDS)
    device = bind_device(place, options.device)
    apply_numerics(config, device, place)
    store = start_world(place, device, timedelta(seconds=timeout), collectives, _says(loaded, options, device))
    watchdog = ending.watchdog = Watchdog(
        place.rank, place.world_size, store, limits, ending.hang, place.hostname, place.agent_store
    )
    with StopSignals() as signals, watchdog:
        parallel = config.parallel
        sizes = sizes_of(place.world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1)
        mesh = build_mesh(sizes, place.rank, device, collectives)
        announce_layout(sizes.dp, sizes.pp, sizes.tp)
        # First of all, because the run folder may be the one that the run which holds them is writing to.
        with watchdog.inside(TAKING):
            save_folders = SaveFolders(config, mesh, timeout)
        try:
            code = _run_in_folder(loaded, place, options, mesh, save_folders, ending, signals)
        finally:
            watchdog.enter("ending")
            save_folders.close(wait=False)
        _leave_together(ending)
        return code


def limits_of(timeout_seconds: float) -> Limits:
    """How long a rank may stay in each phase without progress."""
    long = _PATIENCE * timeout_seconds
    return Limits(timeout_seconds, {**dict.fromkeys(_LONG_PHASES, long), TAKING: long + 2 * LEASE_SECONDS})


def _says(loaded: LoadedConfig, options: Options, device: torch.device) -> dict[str, str]:
    """What must be the same on all ranks: another job, a stale file or a forgotten option must not train with them."""
    return {
        "internlm_lite's code": code_digest(Path(__file__).parents[1]),
        "torch": torch.__version__,
        "device": device.type,
        "--resume": options.resume or "not given",
        "--timeout": f"{options.timeout_seconds:g}",
        **{row["key"]: repr(row["value"]) for row in origin_rows(loaded)},
    }


def _leave_together(ending: Ending) -> None:
    try:
        stop_world()
    except PeerLostError as error:
        ending.failed(error)
        raise


def _run_in_folder(
    loaded: LoadedConfig,
    place: Place,
    options: Options,
    mesh: Mesh,
    save_folders: SaveFolders,
    ending: Ending,
    signals: StopSignals,
) -> int:
    config = loaded.config
    again = any(comm.gather_objects(place.attempt, mesh.world))
    agents = sorted({str(agent) for agent in comm.gather_objects(place.agent, mesh.world) if agent})
    resume = on_main(mesh, lambda: _resume_how(config, options, again, agents, save_folders))
    last = on_main(mesh, lambda: save_folders.last_run() if resume == "auto" else None)
    folder, over = on_main(mesh, lambda: _choose_folder(config, options.run_dir, last))

    def begin() -> None:
        on_main(mesh, lambda: _describe_start(folder, loaded, place, options, agents, mesh.device))
        ending.folder = folder
        setup_logging(place, folder, options.log_style)

    terminal = sys.stdout.isatty() and place.is_main
    try:
        if not over:
            begin()
        config = keep_global_batch(config, last, mesh.dp.size)
        run = build_run(config, mesh, folder, resume, terminal, options.profiling, save_folders, ending.watchdog)
        over = over and run.start.step >= config.data.total_steps
        if ending.folder is None and not over:  # the last checkpoint is damaged: some steps are trained again
            begin()
    except BaseException as error:
        ending.failed(error)
        if place.is_main and ending.folder is not None:
            _note_failure(folder, error)
        raise
    ended = Ended(run.start, "") if over else _train(run, ending, signals)
    if place.is_main:
        _say_goodbye(run, ended, folder)
    return STOPPED if ended.stopped_by and not place.supervised else 0


def _resume_how(config: Config, options: Options, again: bool, agents: Sequence[str], save_folders: SaveFolders) -> str:
    """auto, none or a path; a job that its launcher starts again goes on with what it wrote itself. For rank 0.

    It did where one of its agents started the run of the newest checkpoint. `again`: the launcher's own count, which
    says less, where there are no agents.
    """
    wanted = options.resume or ("auto" if config.ckpt.auto_resume else "none")
    last = save_folders.last_run() if wanted != "auto" else None
    folder = find_run_folder(options.run_dir, config.JOB_NAME, last.folder) if last else None
    if folder is None:
        return wanted
    ours = not agents_of(folder).isdisjoint(agents) if agents else again
    return "auto" if ours else wanted


def _choose_folder(config: Config, root: Path, last: LastRun | None) -> tuple[Path, bool]:
    """The run folder: that of the checkpoint this run will go on from, if it is this run's own, else a new one.

    And whether everything was done there, so that it is not to be written to. For rank 0.
    """
    folder = find_run_folder(root, config.JOB_NAME, last.folder) if last else None
    if last is None or folder is None:
        return create_run_folder(root, config.JOB_NAME, datetime.now().astimezone()), False
    over = last.step >= config.data.total_steps and has_ended(folder / "events.jsonl")
    if not over:
        point_latest(folder.parent, folder.name)
    return folder, over


def _describe_start(
    folder: Path, loaded: LoadedConfig, place: Place, options: Options, agents: Sequence[str], device: torch.device
) -> None:
    now = datetime.now().astimezone()
    clear_failures(folder)
    write_start(folder, loaded, environment(place, options.command, device_name(device), now, agents))


def _train(run: Run, ending: Ending, signals: StopSignals) -> Ended:
    finished = False
    try:
        ended = train(run, signals)
        finished = True
    except BaseException as error:
        ending.failed(error)
        run.reporter.event("failed", **_failure(error, run.folder))
        raise
    finally:
        run.watchdog.enter("ending")
        run.saving.close(wait=finished)
        run.reporter.close()
    return ended


def _note_failure(folder: Path, error: BaseException) -> None:
    """The event of a start that never came to train."""
    file = folder / "events.jsonl"
    with suppress(OSError):
        events = EventsFile(file, next_segment(folder / "metrics.jsonl", file))
        events.event("failed", _failure(error, folder))
        events.close()


def _failure(error: BaseException, folder: Path) -> dict[str, Any]:
    """The cause, as far as it is known to rank 0, which tells."""
    if isinstance(error, KeyboardInterrupt):
        return {"why": "interrupted", "rank": 0}
    known = [(failure.rank, f"{failure.kind}: {failure.message}") for failure in read_failures(folder)]
    rank, why = known[0] if known else (0, f"{type(error).__name__}: {error}")
    return {"why": str(masked(why))[:MOST_OF_WHY], "rank": rank}


def _say_goodbye(run: Run, ended: Ended, folder: Path) -> None:
    total = run.config.data.total_steps
    if ended.stopped_by:
        saved = "nothing saved, because ckpt.enable_save_ckpt=False"
        if run.config.ckpt.enable_save_ckpt:
            saved = "saved; started again, the run goes on from there"
        logger.warning(
            f"stopped by {ended.stopped_by} after {ended.state.step} of {total} steps: {saved}. Everything about this "
            f"run is in {folder}"
        )
        return
    if run.start.step >= total:
        logger.warning(
            f"nothing to do: the checkpoint stands at step {run.start.step} of {total}; raise data.total_steps, or "
            "train anew with --resume none"
        )
    logger.info(f"done: {ended.state.step} steps; everything about this run is in {folder}")
