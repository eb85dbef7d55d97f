"""Shared by the command-line tools: how they end, and their S3 option."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from internlm_lite.errors import INTERRUPTED, InternLMError, StorageError
from internlm_lite.units import escaped

_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class ToolConsole(Console):
    """Tables on standard output. `run_tool` handles a closed pipe, as with print."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render_str(self, text: str, **style: Any) -> Text:
        return super().render_str(escaped(text, keep="\n\t"), **style)


def run_tool(work: Callable[[], int], interrupted: str = "interrupted", *, has_s3_option: bool = False) -> int:
    """Run `work`; returns its exit code. One line on standard error replaces the traceback of our errors, of OSErrors
    about files, and of Ctrl-C (`interrupted`). A closed pipe is no error.

    `has_s3_option`: the tool has no config, so messages name --s3 KEY instead of ckpt.s3.KEY.
    """
    try:
        code = work()
        if sys.stdout is not None:  # None if it was closed before the start
            sys.stdout.flush()
        return code
    except InternLMError as error:
        text = str(error).replace("ckpt.s3.", "--s3 ") if has_s3_option else str(error)
        text = escaped(text, keep="\n\t")
        print(f"{type(error).__name__}: {text}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # such as `| head`
        _discard_output()
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.filename is None and error.errno not in _NOT_WRITTEN:
            raise
        flush_or_discard()
        where = escaped(str(error.filename or "standard output, or a file that was being written"))
        print(f"StorageError: {where}: {error.strerror}; mend it, or give another path", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED


def flush_or_discard() -> None:
    """Flush standard output; one that cannot be written, such as a closed pipe, must not fail again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _discard_output()


def _discard_output() -> None:
    """Redirect standard output to /dev/null, so that flushing it at exit does not fail again."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def add_s3_option(parser: argparse.ArgumentParser) -> None:
    """Add --s3 KEY=VALUE, parsed by `s3_settings`."""
    parser.add_argument(
        "--s3", action="append", default=[], metavar="KEY=VALUE", help="a key of ckpt.s3, such as insecure=True"
    )
