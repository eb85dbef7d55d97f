"""The folder of one run, made by rank 0, which sends its name to the other ranks. A restart continues in it.

RUN/<JOB_NAME>/<time>/{config/, config.resolved.yaml, config.origins.json, env.json, logs/, metrics.jsonl, events.jsonl,
                       samples.jsonl, schedule.json}    config.0/, config.resolved.0.yaml, env.0.json: of earlier starts
RUN/<JOB_NAME>/latest -> <time>
RUN/<JOB_NAME>/<time>-failed/     of a start that failed before it went on in a run folder, which it left alone
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tokenize
from collections.abc import Mapping, Sequence
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml

from internlm_lite.config.load import LoadedConfig
from internlm_lite.config.masking import MASK, mask_source, masked, secrets_of
from internlm_lite.config.render_config import origin_rows, resolved
from internlm_lite.errors import ConfigError, StorageError
from internlm_lite.runtime.dist_env import DistEnv

logger = logging.getLogger("internlm_lite")

PACKAGES = ("torch", "numpy", "pydantic", "sentencepiece", "flash-attn", "triton", "boto3")

_NAME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d(-\d+)?")


def create_run_folder(root: Path, job_name: str, now: datetime) -> Path:
    """Make root/<job_name>/<time>/ with config/ and logs/, and point `latest` at it. Rank 0 only.

    A second run in the same second gets a suffix. Raises ConfigError for a JOB_NAME that cannot name a folder,
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


def failed_start_folder(folder: Path, now: datetime) -> Path:
    """Where a start records its failure if it fails before it goes on in the run folder `folder`. Not made here."""
    return folder.parent / f"{now:%Y-%m-%d_%H-%M-%S}-failed"


def find_run_folder(root: Path, job_name: str, name: str) -> Path | None:
    """root/<job_name>/<name> if `name` has the form that `create_run_folder` gives, and the folder exists."""
    folder = root / job_name / name
    return folder if _NAME.fullmatch(name) and folder.is_dir() else None


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
    """job/latest -> name, replaced by one rename: readers see the old link or the new one, never none."""
    temporary = job / f".latest-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(name)
        temporary.replace(job / "latest")
    except OSError as error:  # some file systems have no links; the run does not need it
        temporary.unlink(missing_ok=True)
        logger.warning("cannot point %s at %s: %s", job / "latest", name, error.strerror)


def write_start(folder: Path, loaded: LoadedConfig, environment: Mapping[str, Any]) -> None:
    """Write what defines a start: config files to config/ (numbered if names repeat), all values to
    config.resolved.yaml, their origins to config.origins.json, and `environment` to env.json. Secrets are masked.

    Files of the previous start are kept as config.0/, config.resolved.0.yaml, ... if they differ. Raises StorageError.
    """
    texts = {f"config/{name}": text for name, text in _sources(loaded.files).items()}
    values = masked(resolved(loaded.config))
    texts["config.resolved.yaml"] = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    texts["config.origins.json"] = json.dumps(origin_rows(loaded), indent=1, ensure_ascii=False) + "\n"
    texts["env.json"] = json.dumps(environment, indent=2) + "\n"
    for secret in secrets_of(loaded.config):
        texts = {name: text.replace(secret, MASK) for name, text in texts.items()}
    try:
        (folder / "config").mkdir(exist_ok=True)
        _backup(folder, texts)
        for old in (folder / "config").iterdir():
            if old.is_file() and f"config/{old.name}" not in texts:
                old.unlink()
        for name, text in texts.items():
            _write(folder / name, text)
    except OSError as error:
        raise StorageError(f"cannot write in {folder}: {error.strerror}; choose another --run-dir") from error


def _sources(files: Sequence[Path]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for source in files:
        name = source.name
        while name in texts:
            name = f"{source.stem}-{len(texts)}{source.suffix}"
        with tokenize.open(source) as file:  # in the file's own encoding
            texts[name] = mask_source(file.read())
    return texts


def environment(
    dist_env: DistEnv, argv: Sequence[str], device: str, now: datetime, agents: Sequence[str] = ()
) -> dict[str, Any]:
    """The contents of env.json; `device` is the device's name, `agents` are those of all ranks (`DistEnv.agent`)."""
    return {
        "time": now.isoformat(timespec="seconds"),
        "command": [_masked_argument(argument) for argument in argv],
        "folder": os.getcwd(),
        "host": dist_env.hostname,
        "launcher": dist_env.launcher,
        "why": dist_env.why,
        "world_size": dist_env.world_size,
        "processes_per_host": dist_env.local_world_size,
        "attempt": dist_env.attempt,
        "agents": list(agents),
        "device": device,
        "cpus": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        "packages": package_versions(),
        "git": git_commit(Path(__file__).parent),
    }


def agents_of(folder: Path) -> set[str]:
    """The agents of the last start in `folder`; empty if unknown."""
    try:
        found = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        return set(found["agents"])
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def package_versions(names: Sequence[str] = PACKAGES) -> Mapping[str, str]:
    """Package -> version, for those of `names` that are installed."""
    versions: dict[str, str] = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_digest(folder: Path) -> str:
    """12 hex digits of sha256 over names and contents of the Python files below `folder`."""
    digest = sha256()
    # Skips lock files of editors, which are broken links.
    for file in sorted(file for file in folder.rglob("*.py") if file.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


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


def _backup(folder: Path, texts: Mapping[str, str]) -> None:
    """Copy the files that differ from `texts` under the next number, and env.json always: it counts the starts."""
    number = next(n for n in itertools.count() if not (folder / f"env.{n}.json").exists())
    for path in [folder / "config", *(folder / name for name in texts if "/" not in name)]:
        kept = path.with_name(f"{path.stem}.{number}{path.suffix}")
        if path.is_dir():
            new = {name.removeprefix("config/"): text.encode() for name, text in texts.items() if "/" in name}
            old = {file.name: file.read_bytes() for file in path.iterdir() if file.is_file()}
            if old and old != new:
                shutil.copytree(path, kept, dirs_exist_ok=True)
        elif path.exists() and (path.name == "env.json" or path.read_bytes() != texts[path.name].encode()):
            shutil.copyfile(path, kept)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
