"""Why a job failed, collected from the records of its ranks: the cause first, then the consequences.

RUN/.../failed/rank-00003.json    written by a rank that fails
RUN/.../failed/guess-00003.json   inferred by other ranks that miss it; used if the rank itself has no record
RUN/.../FAILED.json               {"cause": {...}, "others": [...]}, rewritten after each record: the last is complete

The attributes of a `Failure` are the keys of these files.
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
"""Values of errno that os.link raises on file systems without hard links."""


@dataclass(frozen=True)
class Failure:
    """The failure of one rank."""

    rank: int
    host: str
    step: int | None
    """Index of the current step; None before the first."""
    phase: str
    kind: str
    """Name of the exception's type; "hang", "lost" or "interrupted" if there is no exception."""
    message: str
    exit_code: int
    follows: bool
    """Whether it is a secondary failure, caused by the failure of another rank."""
    trace: str = ""
    """Traceback, or stacks of all threads."""
    time: float = field(default_factory=time.time)
    """Seconds since the epoch, by the clock of the host it was written on."""
    guessed: bool = False
    """Whether another rank inferred it and wrote the record."""


def record(folder: Path, failure: Failure) -> None:
    """Write a rank's failure and the report. An error is only logged, as the process is ending anyway.

    Only the first record of a rank is kept, as its later failures are consequences; likewise the first inferred one.
    """
    file = folder / _FOLDER / f"{'guess' if failure.guessed else 'rank'}-{failure.rank:05d}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = _written(file, asdict(failure))
        if _keep_first(temporary, file):
            write_report(folder)
    except OSError as error:
        logger.warning("cannot write %s: %s", file, error.strerror)


def _keep_first(temporary: Path, file: Path) -> bool:
    """Rename `temporary` to `file` unless `file` exists; returns whether it was renamed."""
    try:
        os.link(temporary, file)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if file.exists():
            return False
        shutil.copyfile(temporary, file)
    finally:
        temporary.unlink()
    return True


def write_report(folder: Path) -> None:
    """Write FAILED.json from all records so far. Raises OSError."""
    written: list[Failure] = []
    # repeat if another rank added a record meanwhile; a new start may have removed all records
    while (failures := read_failures(folder)) and failures != written:
        cause, *others = map(asdict, failures)
        _written(folder / REPORT, {"cause": cause, "others": others}).replace(folder / REPORT)
        written = failures


def read_failures(folder: Path) -> list[Failure]:
    """All records, the cause first: by time, but primary before secondary and recorded before inferred failures, as
    the clocks of hosts differ.
    """
    found: dict[int, Failure] = {}
    for pattern in ("guess-*.json", "rank-*.json"):  # a rank's own record replaces an inferred one
        for file in (folder / _FOLDER).glob(pattern):
            with suppress(OSError, ValueError, TypeError):  # written by another version, or damaged
                failure = Failure(**json.loads(file.read_text(encoding="utf-8")))
                found[failure.rank] = failure
    return sorted(found.values(), key=lambda failure: (failure.follows, failure.guessed, failure.time, failure.rank))


def clear_failures(folder: Path) -> None:
    """Remove all records, for a run that continues in this folder."""
    with suppress(FileNotFoundError):
        (folder / REPORT).unlink()
    shutil.rmtree(folder / _FOLDER, ignore_errors=True)


def summary(failures: Sequence[Failure]) -> str:
    """One paragraph for the log; launch/slurm.sh reads the exit code from it."""
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
    # not named by process id: it may be equal in containers on two nodes, and both may write about one rank
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
