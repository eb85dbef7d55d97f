"""One process of a training job, from the checked config to its exit code."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import NoReturn, cast

import torch

from internlm_lite.config.load import LoadedConfig
from internlm_lite.errors import InternLMError
from internlm_lite.mesh import comm
from internlm_lite.mesh.mesh import Mesh, build_mesh, sizes_of
from internlm_lite.runtime.device import apply_numerics, bind_device, device_name
from internlm_lite.runtime.folder import create_run_folder, write_config, write_environment
from internlm_lite.runtime.log import setup_logging
from internlm_lite.runtime.place import Place
from internlm_lite.runtime.start import announce_layout, end_process, start_world
from internlm_lite.train.build import Run, build_run
from internlm_lite.train.loop import Ended, train
from internlm_lite.train.samples import show_samples

logger = logging.getLogger("internlm_lite")

STOPPED = 3
"""Exit code after a signal or the stop file asked for it, and what was trained is saved."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


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
    try:
        code = _run(loaded, place, options)
    except InternLMError as error:
        logger.error(f"{type(error).__name__}: {error}")
        code = error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted; started again, the run goes on from its newest checkpoint if it has written one")
        code = INTERRUPTED
    except Exception:
        logger.exception(f"rank {place.rank} failed")
        code = 1
    end_process(code)


def _run(loaded: LoadedConfig, place: Place, options: Options) -> int:
    config = loaded.config
    if place.is_main:
        logger.info(place.why)
        for note in loaded.notes:
            logger.info(note)
    timeout = timedelta(seconds=options.timeout_seconds)
    device = bind_device(place, options.device)
    apply_numerics(config, device, place)
    start_world(place, device, timeout)
    parallel = config.parallel
    sizes = sizes_of(place.world_size, parallel.tensor, parallel.pipeline.size, parallel.zero1)
    mesh = build_mesh(sizes, place.rank, device, timeout)
    announce_layout(sizes.dp, sizes.pp, sizes.tp)
    folder = _agree_on_folder(loaded, place, options, mesh, device)
    setup_logging(place, folder, options.log_style)

    resume = options.resume or ("auto" if config.ckpt.auto_resume else "none")
    terminal = sys.stdout.isatty() and place.is_main
    run = build_run(config, mesh, folder, resume, terminal, options.profiling)
    finished = False
    try:
        ended = train(run)
        finished = True
        if not ended.stopped_by:
            show_samples(run)
    finally:
        run.saving.close(wait=finished)
        run.reporter.close()
    if place.is_main:
        _say_goodbye(run, ended, folder)
    # A torchrun agent would take any other code for a failure, and start the ranks again.
    return STOPPED if ended.stopped_by and not place.agent_store else 0


def _say_goodbye(run: Run, ended: Ended, folder: Path) -> None:
    total = run.config.data.total_steps
    if ended.stopped_by:
        saved = "saved" if run.config.ckpt.enable_save_ckpt else "nothing saved, because ckpt.enable_save_ckpt=False"
        logger.warning(
            f"stopped by {ended.stopped_by} after step {ended.state.step - 1} of {total}: {saved}; started again, the "
            f"run goes on from its newest checkpoint. Everything about this run is in {folder}"
        )
        return
    if run.start.step >= total:
        logger.warning(
            f"nothing to do: the checkpoint stands at step {run.start.step} of {total}; raise data.total_steps, or "
            "train anew with --resume none"
        )
    logger.info(f"done: {total} steps; everything about this run is in {folder}")


def _agree_on_folder(loaded: LoadedConfig, place: Place, options: Options, mesh: Mesh, device: torch.device) -> Path:
    """Rank 0 makes the run folder; all ranks know its name, or raise rank 0's error."""
    answer: Path | InternLMError | None = None
    if place.is_main:
        now = datetime.now().astimezone()
        try:
            answer = create_run_folder(options.run_dir, loaded.config.JOB_NAME, now)
            write_config(answer, loaded.config, loaded.files)
            write_environment(answer, place, options.command, device_name(device), now)
        except InternLMError as error:
            answer = error
    told = comm.broadcast_object(answer, mesh.world)
    if isinstance(told, InternLMError):
        raise told
    return cast(Path, told)
