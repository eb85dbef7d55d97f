"""Why a job failed, put together from what its ranks wrote: the cause first, below it what followed from it.

RUN/.../failed/rank-00003.json    by a rank that fails
RUN/.../failed/guess-00003.json   by others that miss it: counts as long as it says nothing itself
RUN/.../FAILED.json               {"cause": {...}, "others": [...]}, written anew by each of them: the last knows most
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

logger = logging.getLogger("internlm_lite")

REPORT = "FAILED.json"
_FOLDER = "failed"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""What file systems without hard links answer."""


@dataclass(frozen=True)
class Failure:
    """What became of one rank."""

    rank: int
    host: str
    step: int | None
    """Index of the step under way; None before the first."""
    phase: str
    kind: str
    """Name of the error's type; "hang", "lost" or "interrupted" where there is no error."""
    message: str
    exit_code: int
    follows: bool
    """It failed because another rank did."""
    trace: str = ""
    """Traceback, or stacks of all threads."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch, by the clock of the host it was written on."""
    guessed: bool = False
    """Written by another rank."""


def record(folder: Path, failure: Failure) -> None:
    """Write a rank's failure and the report. A disk that refuses is told in the log: the process is ending anyway.

    The first record of a rank stays: what it says afterwards follows from that. So does the first guess about it.
    """
    place = folder / _FOLDER / f"{'guess' if failure.guessed else 'rank'}-{failure.rank:05d}.json"
    try:
        place.parent.mkdir(exist_ok=True)
        temporary = _written(place, asdict(failure))
        if _keep_first(temporary, place):
            write_report(folder)
    except OSError as error:
        logger.warning("cannot write %s: %s", place, error.strerror)


def _keep_first(temporary: Path, place: Path) -> bool:
    """Give the file its name unless there is one of that name. Whether it got it."""
    try:
        os.link(temporary, place)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if place.exists():
            return False
        shutil.copyfile(temporary, place)
    finally:
        temporary.unlink()
    return True


def write_report(folder: Path) -> None:
    """FAILED.json of what is known by now. Raises OSError."""
    told: list[Failure] = []
    # anew where another rank wrote its own meanwhile, and knew less; none are left where a new start cleared them
    while (failures := read_failures(folder)) and failures != told:
        cause, *others = map(asdict, failures)
        _written(folder / REPORT, {"cause": cause, "others": others}).replace(folder / REPORT)
        told = failures


def read_failures(folder: Path) -> list[Failure]:
    """The cause first. Clocks of hosts differ, so what says of itself that it follows never comes first by its time,
    nor does what is only guessed before what is known.
    """
    found: dict[int, Failure] = {}
    for pattern in ("guess-*.json", "rank-*.json"):  # a rank's own words replace what others guessed
        for file in (folder / _FOLDER).glob(pattern):
            with suppress(OSError, ValueError, TypeError):  # of another version, or damaged: it explains nothing
                failure = Failure(**json.loads(file.read_text(encoding="utf-8")))
                found[failure.rank] = failure
    return sorted(found.values(), key=lambda failure: (failure.follows, failure.guessed, failure.time, failure.rank))


def clear_failures(folder: Path) -> None:
    """A run that goes on in this folder has not failed."""
    with suppress(FileNotFoundError):
        (folder / REPORT).unlink()
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def summary(failures: Sequence[Failure]) -> str:
    """One paragraph for people, and for launch/slurm.sh, which takes the code from it."""
    cause, *others = failures
    where = f"at step {cause.step}, {cause.phase}" if cause.step is not None else cause.phase
    text = f"rank {cause.rank} on {cause.host} failed first (code {cause.exit_code}), {where}: {cause.kind}: "
    text += cause.message
    if others:
        named = ", ".join(str(other.rank) for other in others[:8]) + (", ..." if others[8:] else "")
        text += f"\n  others failed because of it, or after it: {named}"
    return text


def _written(path: Path, value: object) -> Path:
    """A temporary file beside `path` with the JSON of `value`, flushed."""
    # not by process id: in containers on two nodes they are often the same, and both may write about one rank
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
