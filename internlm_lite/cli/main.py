"""internlm-lite COMMAND [arguments]: one module for each command, imported when it is asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from internlm_lite import __version__
from internlm_lite.runtime.tool import run_tool

COMMANDS = {
    "train": ("train", "train a model from a config file"),
    "plan": ("show_plan", "show what a training run will hold, send and cost, without starting it"),
    "new": ("new", "write a config for your data, hardware, and a wanted time or size"),
    "init": ("init", "write example configs and launch scripts into a folder"),
    "demo": ("demo", "from nothing to a trained decoder, on text of this machine"),
    "inspect-data": ("inspect_data", "show what the batches of a config look like"),
    "tokenizer": ("tokenize_text", "train a tokenizer, and tokenise folders of text"),
    "pair-corpus": ("pair_corpus", "pairs in two languages from Debian's manuals"),
    "generate": ("generate_text", "continue prompts with a trained model"),
    "evaluate": ("evaluate", "loss, bits per byte and tasks of a checkpoint"),
    "ckpt": ("ckpt", "list, verify and remove checkpoints"),
    "convert": ("convert", "convert checkpoints to Hugging Face folders and back"),
    "report": ("write_report", "write report.html of one run or several"),
    "dashboard": ("dashboard", "serve a live page over one run or several"),
    "doctor": ("doctor", "check what all ranks of a job run on"),
    "slurm": ("slurm", "write a batch file for Slurm"),
    "bench": ("bench", "compare speed with common alternatives (in a checkout)"),
    "gpu-check": ("gpu_check", "check correctness and speed on a GPU (in a checkout)"),
}
"""Command -> (module of internlm_lite.cli, one-line description)."""


def usage() -> str:
    lines = [f"  {command:<14}{summary}" for command, (_, summary) in COMMANDS.items()]
    head = ["usage: internlm-lite COMMAND [arguments]", "       internlm-lite COMMAND --help", ""]
    return "\n".join([*head, *lines])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code, 2 for a command that is unknown or not installed."""
    return run_tool(lambda: _run_command(sys.argv[1:] if argv is None else argv))


def _run_command(argv: Sequence[str]) -> int:
    command, *arguments = argv or ["--help"]
    command = command.replace("_", "-")
    if command in ("-h", "--help"):
        print(usage())
        return 0
    if command == "--version":
        print(f"internlm-lite {__version__}")
        return 0
    if command not in COMMANDS:
        print(f"found no command {command!r}; expected one of those below\n{usage()}", file=sys.stderr)
        return 2
    if command in ("bench", "gpu-check") and find_spec("internlm_lite.apps.bench") is None:
        print(f"{command}: not part of the installed package; run it in a checkout", file=sys.stderr)
        return 2
    module = importlib.import_module(f"internlm_lite.cli.{COMMANDS[command][0]}")
    # The doctor ends the process itself: its threads may hang.
    code: int = (module.run if command == "doctor" else module.main)(arguments)
    return code


def run() -> None:
    """The entry point of `internlm-lite` and of `python -m internlm_lite`."""
    sys.exit(main())
