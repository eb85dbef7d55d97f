"""The folder of one run, made by rank 0; the other ranks are told its name.

RUN/<JOB_NAME>/<time>/{config/, config.resolved.yaml, env.json, logs/, metrics.jsonl, events.jsonl}
RUN/<JOB_NAME>/latest -> <time>
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from internlm_lite.config.schema import Config
from internlm_lite.config.view import masked, resolved
from internlm_lite.errors import ConfigError, StorageError
from internlm_lite.runtime.place import Place

logger = logging.getLogger("internlm_lite")

PACKAGES = ("torch", "numpy", "pydantic", "safetensors", "sentencepiece", "flash-attn", "triton", "boto3")

# name = "text", "name": "text", or a text alone
_LITERAL = re.compile(
    r"""(?:["']?(?P<name>\w+)["']?\s*[=:]\s*)?[fr]?(?P<quote>["'])(?P<text>(?:\\.|(?!(?P=quote)).)*)(?P=quote)"""
)


def create_run_folder(root: Path, job_name: str, now: datetime) -> Path:
    """Make root/<job_name>/<time>/ with config/ and logs/, and point `latest` at it. Rank 0 only.

    A second run of the same second gets a suffix. Raises ConfigError for a JOB_NAME that is no folder name,
    StorageError when the folder cannot be written.
    """
    if not job_name or job_name in (".", "..") or "/" in job_name or "\0" in job_name:
        raise ConfigError(f"JOB_NAME {job_name!r}: expected the name of one folder, without '/'")
    job = root / job_name
    stamp = now.strftime("%Y-%m-%d_%H-%M-%S")
    try:
        job.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(job, stamp)
        for part in ("config", "logs"):
            (folder / part).mkdir()
    except OSError as error:
        raise StorageError(f"cannot make a run folder in {job}: {error.strerror}; choose another --run-dir") from error
    point_latest(job, folder.name)
    return folder


def _new_folder(job: Path, stamp: str) -> Path:
    for attempt in range(1, 1000):
        folder = job / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise StorageError(f"{job} holds 999 runs of the second {stamp}; choose another --run-dir")


def point_latest(job: Path, name: str) -> None:
    """job/latest -> name, replaced in one rename: a reader sees the old link or the new one, never none."""
    temporary = job / f".latest-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(job / "latest")
    except OSError as error:  # some file systems have no links: a convenience is lost, not the run
        temporary.unlink(missing_ok=True)
        logger.warning(f"cannot point {job / 'latest'} at {name}: {error.strerror}")


def write_config(folder: Path, config: Config, files: Sequence[Path]) -> None:
    """Copies of every config file read, in config/, and all resolved values in config.resolved.yaml; secrets masked.

    Files of the same name from different folders are numbered. Raises StorageError.
    """
    taken: set[str] = set()
    for source in files:
        name = source.name
        while name in taken:
            name = f"{source.stem}-{len(taken)}{source.suffix}"
        taken.add(name)
        _write(folder / "config" / name, mask_source(source.read_text(encoding="utf-8")))
    values = masked(resolved(config))
    _write(folder / "config.resolved.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def mask_source(text: str) -> str:
    """A config file's text with secrets inside its string literals as ***; without any it comes back unchanged."""

    def mask(match: re.Match[str]) -> str:
        content = match["text"]
        clean = str(masked(content, match["name"] or ""))
        start, end = (index - match.start() for index in match.span("text"))
        return match[0][:start] + clean + match[0][end:]

    return _LITERAL.sub(mask, text)


def write_environment(folder: Path, place: Place, argv: Sequence[str], device: str, now: datetime) -> None:
    """env.json: what this run was started with and on; no environment variables, secrets live there.

    Raises StorageError.
    """
    _write(folder / "env.json", json.dumps(environment(place, argv, device, now), indent=2) + "\n")


def environment(place: Place, argv: Sequence[str], device: str, now: datetime) -> dict[str, Any]:
    """The contents of env.json; `device` is the device's name."""
    return {
        "time": now.isoformat(timespec="seconds"),
        "command": [_masked_argument(argument) for argument in argv],
        "folder": os.getcwd(),
        "host": place.hostname,
        "launcher": place.launcher,
        "why": place.why,
        "world_size": place.world_size,
        "processes_per_host": place.local_world_size,
        "attempt": place.attempt,
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": package_versions(),
        "git": git_commit(Path(__file__).parent),
    }


def package_versions(names: Sequence[str] = PACKAGES) -> Mapping[str, str]:
    """Versions of those packages that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_commit(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds `folder`, and whether tracked files differ from it; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def _masked_argument(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return f"{name}={masked(value, name)}" if equals else str(masked(argument))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another --run-dir") from error
