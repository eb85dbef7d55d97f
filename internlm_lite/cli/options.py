"""Options shared by several commands, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from internlm_lite.errors import ConfigError
from internlm_lite.runtime.tool import flush_or_discard
from internlm_lite.units import wait_seconds

if TYPE_CHECKING:
    from internlm_lite.config.schema import S3Config


class CommandParser(argparse.ArgumentParser):
    """Ends well if nobody reads its help (`| head`)."""

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush_or_discard()
        super().exit(status, message)


def new_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """`description`: the docstring of the command's module, shown with its line breaks."""
    return CommandParser(
        prog=f"internlm-lite {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_config(parser: argparse.ArgumentParser, *, required: bool = True, text: str = "Python config file") -> None:
    """Add --config, and overrides anywhere on the command line: parse with `parse_intermixed_args`."""
    parser.add_argument("--config", type=Path, required=required, help=text)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes to the config")


DEVICES = ("auto", "cpu", "cuda")


def add_device(parser: argparse.ArgumentParser) -> None:
    text = "default: a GPU if there is one"
    parser.add_argument("--device", choices=DEVICES, default="auto", help=text)


def add_weights(parser: argparse.ArgumentParser) -> None:
    text = "model, or ema: the averaged weights of a run with `ema` in its config (model)"
    parser.add_argument("--weights", choices=["model", "ema"], default="model", help=text)


def add_launcher(parser: argparse.ArgumentParser, timeout: float, world_size_help: str = "likewise") -> None:
    """Add the options of the launcher and the rendezvous. `timeout`: default, in seconds."""
    add, text = parser.add_argument, f"longest wait for other ranks ({timeout:g})"
    add(
        "--launcher",
        choices=["auto", "slurm", "torch", "mpi", "single"],
        default="auto",
        help="what started this process",
    )
    add("--host", help="where rank 0 listens (default: from the launcher)")
    add("--port", type=int, help="its port (default: from the launcher)")
    add("--local-rank", "--local_rank", type=int, metavar="N", help="accepted for old launchers, and checked")
    add("--rank", type=int, metavar="N", help="likewise")
    add("--world-size", "--world_size", type=int, metavar="N", help=world_size_help)
    add("--timeout", type=wait_seconds, default=timeout, metavar="SECONDS", help=text)


def check_at_least(parser: argparse.ArgumentParser, arguments: argparse.Namespace, **least: int) -> None:
    """Exit with a usage error if an option is below its minimum in `least`; None is not checked."""
    for name, smallest in least.items():
        value = getattr(arguments, name, None)
        if value is not None and value < smallest:
            parser.error(f"--{name.replace('_', '-')} {value}: expected at least {smallest}")


def s3_settings(texts: Sequence[str]) -> S3Config:
    """Parse the --s3 options of a command without a config, such as `insecure=True`. Raises ConfigError."""
    from pydantic import ValidationError

    from internlm_lite.config.overrides import parse_overrides
    from internlm_lite.config.schema import S3Config

    values = parse_overrides([f"ckpt.s3.{text}" for text in texts]).layer.values
    try:
        return S3Config.model_validate(values.get("ckpt", {}).get("s3", {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"--s3 {key}: {first['msg']}; expected keys: {', '.join(S3Config.model_fields)}") from None
