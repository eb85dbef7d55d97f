"""A batch file for Slurm: #SBATCH options, then a call of launch/slurm.sh, the script of the job.

world 16, 8 per node  ->  --nodes=2 --ntasks-per-node=8 --gpus-per-node=8
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from internlm_lite.errors import ConfigError, MeshError

EARLY_SECONDS = 60
"""Seconds by which Slurm may send the signal early, according to its documentation."""

_NAME = re.compile(r"[\w.,+@-]+")
_PATH = re.compile(r"[\w./,+@=:~-]+")
"""Paths that need no quoting in an #SBATCH line and contain none of Slurm's % patterns."""
_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")


@dataclass(frozen=True)
class SlurmJob:
    """The contents of the file. Paths are absolute, on a file system that all nodes share."""

    name: str
    about: str
    """One line of description."""
    nodes: int
    per_node: int
    """Tasks per node, with a GPU each."""
    on_gpus: bool
    cpus_per_task: int
    partition: str | None
    account: str | None
    time: str | None
    """Time limit in Slurm's format; None: the partition's limit."""
    lead_seconds: int
    """Seconds before the limit at which Slurm signals the ranks to save and stop."""
    logs: Path
    folder: Path
    """Working directory of the job; relative paths of the config refer to it."""
    repository: Path
    arguments: tuple[str, ...]
    """Arguments of train.py: the config, then others."""


def nodes_of(world_size: int, per_node: int) -> tuple[int, int]:
    """(nodes, tasks per node) of a world. Raises MeshError when the last node would be partly filled."""
    if world_size <= per_node:
        return 1, world_size
    if world_size % per_node:
        fitting = [size for size in range(per_node, 1, -1) if world_size % size == 0]
        instead = f", or --gpus-per-node {fitting[0]}" if fitting else ""
        below = world_size // per_node * per_node
        raise MeshError(
            f"--world-size {world_size}: found no whole number of nodes with --gpus-per-node {per_node}; expected a "
            f"multiple of it: {below} or {below + per_node}{instead}"
        )
    return world_size // per_node, per_node


def time_seconds(text: str) -> int:
    """Seconds of a time limit in one of Slurm's formats. Raises ConfigError."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ConfigError(f"--time {text!r}: expected MINUTES, MM:SS, HH:MM:SS, DAYS-HH, DAYS-HH:MM or DAYS-HH:MM:SS")
    numbers = [int(match[name]) for name in ("first", "second", "third") if match[name]]
    if match["days"]:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # minutes[:seconds]
        hours, minutes, seconds = [0, *numbers, 0][:3]
    return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def sbatch_text(job: SlurmJob) -> str:
    """Text of the file. Raises ConfigError with all values that Slurm would misread."""
    if problems := list(_problems(job)):
        raise ConfigError("\n".join(problems))
    options = "\n".join(f"#SBATCH --{option}" for option in _options(job))
    call = " ".join(map(shlex.quote, (str(job.repository / "launch" / "slurm.sh"), *job.arguments)))
    return f"""\
#!/usr/bin/env bash
# {job.about}
# Written by tools/slurm.py. What the job does, and what puts it back into the queue, stands in launch/slurm.sh.
{options}
export REPOSITORY={shlex.quote(str(job.repository))} LOG_FOLDER={shlex.quote(str(job.logs))}
exec bash {call}
"""


def _options(job: SlurmJob) -> Iterator[str]:
    yield f"job-name={job.name}"
    if job.partition:
        yield f"partition={job.partition}"
    if job.account:
        yield f"account={job.account}"
    if job.time:
        yield f"time={job.time}"
    yield f"nodes={job.nodes}"
    yield f"ntasks-per-node={job.per_node}"
    if job.on_gpus:
        # Per node, not per task: NCCL has no direct access to GPUs that are hidden from a task.
        yield f"gpus-per-node={job.per_node}"
    yield f"cpus-per-task={job.cpus_per_task}"
    yield f"chdir={job.folder}"
    yield f"output={job.logs}/slurm-%j.log"
    yield "open-mode=append"
    yield "requeue"
    yield f"signal=B:USR1@{job.lead_seconds}"


def _problems(job: SlurmJob) -> Iterator[str]:
    for option, name in (("JOB_NAME", job.name), ("--partition", job.partition), ("--account", job.account)):
        if name is not None and not _NAME.fullmatch(name):
            yield f"{option} {name!r}: expected letters, digits and . , + @ - _ alone, for Slurm"
    for option, path in (("--output", job.logs), ("the working folder", job.folder)):
        if not _PATH.fullmatch(str(path)):
            yield f"{option} {str(path)!r}: expected no blanks, quotes or % in it, for Slurm; choose another folder"
    least = job.lead_seconds + EARLY_SECONDS
    if job.time is not None and time_seconds(job.time) <= least:
        yield (
            f"--time {job.time}: found {time_seconds(job.time)} s, expected more than {least}: ranks are told to stop "
            f"--signal {job.lead_seconds} s before the limit, and Slurm may be {EARLY_SECONDS} s early"
        )
