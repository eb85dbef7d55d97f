"""A live page over one or several runs: loss and accuracy of every data folder, speed, checkpoints, samples, events.

python tools/dashboard.py RUN/demo                 the runs of a job, new ones as they come
python tools/dashboard.py RUN/demo/latest --port 0
"""

from __future__ import annotations

import argparse
import logging
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from internlm_lite.errors import InternLMError
from internlm_lite.report.server import Dashboard
from internlm_lite.report.watch import Watch

PORT = 8090


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="dashboard", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, job folders, or RUN itself")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: any free one")
    parser.add_argument("--bind", default="127.0.0.1", metavar="ADDRESS", help="another one needs --token")
    parser.add_argument(
        "--token", nargs="?", const="", help="ask for it; without a value one is made and printed with the address"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.port < 1 << 16:
        parser.error(f"--port: found {arguments.port}, expected 0 to {(1 << 16) - 1}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 after Ctrl-C, 2 bad input."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    token = secrets.token_urlsafe(16) if arguments.token == "" else arguments.token
    watch = None
    try:
        watch = Watch(arguments.runs)
        with Dashboard(watch, arguments.port, arguments.bind, token) as server:
            print(f"dashboard: {server.address}  (Ctrl-C ends it)", flush=True)
            server.serve_forever(poll_interval=0.2)
    except InternLMError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print()
    finally:
        if watch is not None:
            watch.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
