"""Log records of this process, in InternLM's format: a file for every rank, and the terminal of rank 0.

    2023-11-10 11:45:25,162 INFO launch.py:409 in launch -- Distributed environment is initialized, ...

All modules use `logging.getLogger("internlm_lite")`. A record may have two attributes (by `extra=`):
`verbatim=True`: its message is a complete line; `compact="..."`: text that a terminal shows instead.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Literal, TextIO

from internlm_lite.errors import StorageError
from internlm_lite.runtime.dist_env import DistEnv
from internlm_lite.units import escaped

Style = Literal["full", "compact"]

logger = logging.getLogger("internlm_lite")

_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[1;31m"}
_RESET = "\x1b[0m"
_EARLY_RECORDS = 10_000


class FullFormatter(logging.Formatter):
    """`YYYY-MM-DD HH:MM:SS,mmm LEVEL file.py:LINE in func -- message`, or the message of a verbatim record."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(filename)s:%(lineno)d in %(funcName)s -- %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        if getattr(record, "verbatim", False):
            return record.getMessage()
        return escaped(super().format(record), keep="\n\t")


class CompactFormatter(logging.Formatter):
    """`HH:MM:SS message`; warnings and errors are preceded by their level, in colour on a terminal."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%H:%M:%S")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        compact: str | None = getattr(record, "compact", None)
        if compact is not None:
            return compact
        text = escaped(super().format(record), keep="\n\t")
        if record.levelno < logging.WARNING:
            return text
        text = f"{record.levelname} {text}"
        return f"{_COLOURS.get(record.levelno, '')}{text}{_RESET}" if self._colour else text


class _ReportsOnce(logging.Handler):
    """Reports its first error on stderr and ignores later ones: a full disk or a closed pipe must not end the run."""

    output = "standard output"
    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        self._report(sys.exc_info()[1])

    def _report(self, error: BaseException | None) -> None:
        if not self._failed:
            self._failed = True
            with suppress(OSError):  # stderr may be a file on the same full disk
                print(f"WARNING cannot write {self.output}: {error}", file=sys.stderr)


class StdoutHandler(_ReportsOnce, logging.StreamHandler[TextIO]):
    """Writes to the current `sys.stdout`, which a progress bar may have replaced to print records above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def resolve_style(style: str, stream: TextIO) -> Style:
    """Resolve `auto`: compact if `stream` is a terminal, else full."""
    if style == "auto":
        return "compact" if stream.isatty() else "full"
    assert style in ("full", "compact"), style
    return "compact" if style == "compact" else "full"


def setup_logging(dist_env: DistEnv, folder: Path | None, style: str = "auto") -> None:
    """Send this rank's records to stdout (rank 0: INFO, others: WARNING), and all of them to its file in folder/logs.

    Call it at start with folder None, and again once the run folder is known: earlier records then go to the file
    too. `style`: full, compact, or auto (compact on a terminal). Raises StorageError when the file cannot be opened.
    """
    early = next((handler for handler in logger.handlers if isinstance(handler, MemoryHandler)), None)
    early = early or MemoryHandler(_EARLY_RECORDS, flushLevel=sys.maxsize, flushOnClose=False)
    close_logging()
    logger.setLevel(logging.DEBUG)
    logger.propagate = False  # a library that configures the root logger must not print our records twice
    # On an error torch logs its whole pipeline schedule at level ERROR; the exception is enough.
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)

    stdout = StdoutHandler()
    stdout.setLevel(logging.INFO if dist_env.is_main else logging.WARNING)
    compact = resolve_style(style, sys.stdout) == "compact"
    stdout.setFormatter(CompactFormatter(colour=sys.stdout.isatty()) if compact else FullFormatter())
    logger.addHandler(stdout)

    if folder is None:
        logger.addHandler(early)
        return
    file = _open_rank_file(folder / "logs" / f"rank-{dist_env.rank:05d}.log")
    early.setTarget(file)
    early.flush()
    logger.addHandler(file)


def close_logging() -> None:
    """Flush and remove the handlers of `setup_logging`."""
    for handler in list(logger.handlers):
        if isinstance(handler, StdoutHandler | MemoryHandler | logging.FileHandler):
            logger.removeHandler(handler)
            handler.close()


def flush_logging() -> None:
    """Flush all handlers, ignoring errors: the exit code does not depend on them."""
    for output in (*logger.handlers, sys.stdout, sys.stderr):
        with suppress(OSError):
            output.flush()


class _RankFile(_ReportsOnce, logging.FileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8")
        self.output = str(path)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._report(error)

    def close(self) -> None:
        try:
            super().close()
        except OSError as error:  # buffered records are lost; the descriptor is closed nevertheless
            self._report(error)


def _open_rank_file(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = _RankFile(path)
    except OSError as error:
        raise StorageError(f"cannot write the log file {path}: {error.strerror}; choose another --run-dir") from error
    file.setLevel(logging.DEBUG)
    file.setFormatter(FullFormatter())
    return file
