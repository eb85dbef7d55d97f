"""The runs at a path: a run folder, a job folder with runs, or a folder of jobs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from internlm_lite.apps.report.run import RUN_FILES, is_run
from internlm_lite.apps.report.untrusted_files import printable
from internlm_lite.errors import ConfigError

MAX_RUNS = 8
"""Most runs taken from one job folder or folder of jobs: of those with a step the last active ones, then others."""


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run folders in the order of `paths`, those of a job as last active, each once, with links followed.

    Raises ConfigError for a path that is no folder or cannot be read.
    """
    found: dict[Path, None] = {}
    for path in paths:
        try:
            found |= dict.fromkeys(_all_in(path)[:MAX_RUNS])
        except OSError as error:
            raise ConfigError(
                f"cannot read {printable(error.filename or path)}: {error.strerror}; "
                "expected a run folder RUN/JOB/TIME, a job folder RUN/JOB, or RUN itself"
            ) from error
    return list(found)


def require_runs(paths: Sequence[Path]) -> list[Path]:
    """`find_runs`, but also raises ConfigError for a path without runs."""
    for path in paths:
        if not find_runs([path]):
            raise ConfigError(
                f"found no run in {printable(path)}; "
                "expected a run folder RUN/JOB/TIME with metrics.jsonl, a job folder RUN/JOB, or RUN itself"
            )
    return find_runs(paths)


def omitted_runs(paths: Sequence[Path]) -> list[str]:
    """A line for each path with more than MAX_RUNS runs. Raises OSError."""
    counts = {path: len(_all_in(path)) for path in paths}
    return [
        f"{printable(path)}: the last active {MAX_RUNS} of {count} runs; name others to see them"
        for path, count in counts.items()
        if count > MAX_RUNS
    ]


def run_name(folder: Path) -> str:
    """Name of a run for users: JOB/TIME."""
    return printable(Path(*folder.resolve().parts[-2:]))


def _all_in(path: Path) -> list[Path]:
    path = path.resolve(strict=True)
    if is_run(path):
        return [path]
    inner = _folders(path)
    runs = {folder for folder in inner if is_run(folder)}
    if not runs:
        runs = {folder for job in inner for folder in _folders(job) if is_run(folder)}
    return sorted(runs, key=lambda folder: (*_activity(folder), folder.name, folder), reverse=True)


def _activity(folder: Path) -> tuple[bool, int]:
    """Whether a run has step lines, and when it last wrote."""
    status = [file.stat() for name in RUN_FILES if (file := folder / name).is_file()]
    metrics = folder / RUN_FILES[0]
    has_steps = metrics.is_file() and metrics.stat().st_size > 0
    return has_steps, max((found.st_mtime_ns for found in status), default=0)


def _folders(path: Path) -> list[Path]:
    """Readable subfolders; a link, such as `latest`, is resolved."""
    return [folder.resolve() for folder in path.iterdir() if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)]
