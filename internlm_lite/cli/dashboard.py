"""A live page over one or several runs: loss and accuracy of every data folder, speed, checkpoints, samples, events.

internlm-lite dashboard RUN/demo                 the runs of a job, new ones as they come
internlm-lite dashboard RUN/demo/latest --port 0
"""

from __future__ import annotations

import argparse
import logging
import secrets
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from internlm_lite.apps.report.discover import omitted_runs
from internlm_lite.apps.report.live_runs import LiveRuns
from internlm_lite.apps.report.server import Dashboard
from internlm_lite.apps.report.untrusted_files import printable, read_file
from internlm_lite.cli.options import new_parser
from internlm_lite.errors import ConfigError
from internlm_lite.runtime.tool import run_tool

PORT = 8090


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = new_parser("dashboard", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, job folders, or RUN itself")
    add("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    add("--bind", default="127.0.0.1", metavar="ADDRESS", help="another one needs a token")
    tokens = parser.add_mutually_exclusive_group()
    tokens.add_argument(
        "--token", nargs="?", const="", help="ask for it; without a value one is made and printed with the address"
    )
    tokens.add_argument(
        "--token-file", type=Path, metavar="FILE", help="with the token: other users of this machine see arguments"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port < 1 << 16:
        parser.error(f"--port: found {arguments.port}, expected 0 to {(1 << 16) - 1}")
    return arguments


def read_token(arguments: argparse.Namespace) -> str | None:
    """The access token; None if none is required. Raises ConfigError."""
    if arguments.token and Path(arguments.token).exists():
        raise ConfigError(f"--token {arguments.token} is a file or folder; put runs first, or use --token-file")
    if arguments.token_file is None:
        return secrets.token_urlsafe(16) if arguments.token == "" else arguments.token
    try:
        return read_file(arguments.token_file).strip()
    except OSError as error:
        raise ConfigError(f"cannot read --token-file {printable(arguments.token_file)}: {error.strerror}") from error


def serve(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C; returns the exit code."""
    token = read_token(arguments)
    with closing(LiveRuns(arguments.runs)) as watch:
        for line in omitted_runs(arguments.runs):
            print(line)
        with Dashboard(watch, arguments.port, arguments.bind, token) as server:
            print(f"dashboard: {server.address}  (Ctrl-C ends it)", flush=True)
            try:
                server.serve_forever(poll_interval=0.2)
            except KeyboardInterrupt:
                print()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after Ctrl-C, 2 bad input, 130 interrupted before it served."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    return run_tool(partial(serve, arguments))
