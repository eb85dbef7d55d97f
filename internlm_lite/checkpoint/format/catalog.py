"""Finds the checkpoints of a folder, inspects them, and removes old ones.

Names determine their order (see `manifest.Name`). Inspection does not read tensors: it compares the hashes of commit
and manifest and the sizes of all other files. load/ verifies the tensors when it reads them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

from pydantic import ValidationError

from internlm_lite.checkpoint.format.manifest import (
    FORMAT,
    Commit,
    Kind,
    Manifest,
    Name,
    load_with_crc,
    read_bytes,
    vote_of,
)
from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.format.regions import tiling_problems
from internlm_lite.checkpoint.storage.base import RUN_LOCK_KEY, Storage, StoredObject
from internlm_lite.config.run_stages import in_stage, stage_at
from internlm_lite.config.schema import Config
from internlm_lite.errors import CheckpointError, DamagedError

logger = logging.getLogger("internlm_lite")
_COMMIT = re.compile(r"(?:(?P<folder>.+)/)?commits/(?P<name>[^/]+)\.json")
_NESTED = re.compile(r"/(?:commits/[^/]+\.json$|data/)")
ORPHAN_SECONDS = 3600.0
"""Age after which files of an uncommitted save are removed; before, its writer may still be alive."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that inspection, which does not read tensors, found complete."""

    storage: Storage
    folder: str
    """Key of its data folder; "" for the storage's root."""
    manifest: Manifest
    rejected: tuple[str, ...] = ()
    """Newer damaged checkpoints that were skipped: "name: reason"."""

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def order(self) -> int:
        """Serial number: increases with every save, also after a rollback to an earlier step; 0 without one."""
        name = Name.parse(self.name)
        return name.serial if name else 0

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def manifest_path(self) -> str:
        """Name of the manifest in messages."""
        return f"{self.storage.name}/{self.key('manifest.json')}"

    def config(self) -> Config:
        """The config of the run that saved it. Raises CheckpointError if this version cannot read it."""
        try:
            return Config.model_validate(self.manifest.config)
        except ValidationError as error:
            raise CheckpointError(
                f"checkpoint {self.name}: this version cannot read the config it was saved with: "
                f"{error.error_count()} unknown or wrong keys, first {'.'.join(map(str, error.errors()[0]['loc']))}"
            ) from error

    def config_of_stage(self) -> Config:
        """The config as if the run had the stage alone in which it was saved: lengths and rotary base are those that
        the weights were trained with. Raises CheckpointError as `config`."""
        return self.in_its_stage(self.config())

    def in_its_stage(self, config: Config) -> Config:
        """`config` as if it had the stage alone in which this was saved."""
        batch = self.manifest.state.get("train", {}).get("position", {}).get("batch", self.step)
        return in_stage(config, stage_at(config, max(0, batch - 1))) if config.stages else config

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file


def committed(storage: Storage, inside: str = "") -> list[Name]:
    """Names of all commits, newest first. `inside`: "" or a save folder inside the storage, from `folders_in`."""
    folder = _below(inside, "commits")
    keys = (entry.key.removeprefix(f"{folder}/").removesuffix(".json") for entry in storage.list(folder))
    return sorted((name for name in map(Name.parse, keys) if name is not None), reverse=True)


def folders_in(entries: Iterable[StoredObject]) -> list[str]:
    """Keys of all save folders in a listing, "" for its root. By default snapshots have their own folder inside."""
    matches = (_COMMIT.fullmatch(entry.key) for entry in entries)
    return sorted({match["folder"] or "" for match in matches if match and Name.parse(match["name"])})


def _below(inside: str, key: str) -> str:
    return f"{inside}/{key}" if inside else key


@read_twice
def inspect(storage: Storage, name: Name, inside: str = "") -> Found:
    """Inspect a committed checkpoint. Raises DamagedError naming the damaged file, CheckpointError as `found_in`."""
    at_commit, at_manifest = _below(inside, name.commit), _below(inside, name.manifest)
    commit = load_with_crc(Commit, read_bytes(storage, at_commit), f"{storage.name}/{at_commit}")
    if (commit.name, commit.step, commit.manifest) != (str(name), name.step, name.manifest):
        raise DamagedError(f"{storage.name}/{at_commit} is the commit of {commit.name}")
    data = read_bytes(storage, at_manifest)
    sha256 = hashlib.sha256(data).hexdigest()
    if (len(data), sha256) != (commit.size, commit.sha256):
        raise DamagedError(
            f"{storage.name}/{at_manifest}: damaged: {len(data)} bytes with sha256 {sha256[:12]}..., "
            f"the commit says {commit.size} and {commit.sha256[:12]}..."
        )
    found = found_in(storage, _below(inside, name.folder), data)
    if found.name != str(name):
        raise DamagedError(f"{storage.name}/{at_manifest} is the manifest of {found.name}")
    return found


def found_in(storage: Storage, folder: str, data: bytes) -> Found:
    """The checkpoint with the manifest `data`. Raises DamagedError naming a file that is missing or has the wrong size,
    or a tensor that is not tiled; CheckpointError for another format."""
    prefix = f"{folder}/" if folder else ""
    manifest = load_with_crc(Manifest, data, f"{storage.name}/{prefix}manifest.json")
    if manifest.format != FORMAT:
        raise CheckpointError(
            f"{storage.name}/{prefix}manifest.json: format {manifest.format}, expected {FORMAT}: "
            "it was written by another version of internlm_lite"
        )
    sizes = {entry.key: entry.size for entry in storage.list(folder)}
    for file, facts in manifest.files.items():
        for key, expected in ((prefix + file, facts.size), (prefix + vote_of(file), facts.vote_size)):
            if sizes.get(key) != expected:
                has = "is missing" if key not in sizes else f"has {sizes[key]} bytes"
                raise DamagedError(f"{storage.name}/{key} {has}, expected {expected} bytes")
    for role, named in manifest.tensors.items():
        for name, entry in named.items():
            problems = tiling_problems(entry.shape, [(piece.file, piece.region) for piece in entry.pieces])
            if problems:
                raise DamagedError(f"{storage.name}/{prefix}manifest.json: {role} of {name}: {problems[0]}")
    return Found(storage, folder, manifest)


def newest(
    storage: Storage,
    known_bad: Mapping[str, str],
    folders: Sequence[str] = ("",),
    accept: Callable[[Found], bool] = lambda found: True,
) -> Found | None:
    """The newest undamaged checkpoint of `folders` for which `accept` is true; None if there is none.

    `known_bad`: name -> reason, checkpoints found damaged while loading. Raises CheckpointError if damaged ones were
    skipped and no other is left.
    """
    named = [(name, inside) for inside in folders for name in committed(storage, inside)]
    rejected = []
    for name, inside in sorted(named, reverse=True):
        try:
            if str(name) in known_bad:
                raise DamagedError(known_bad[str(name)])
            found = inspect(storage, name, inside)
        except DamagedError as error:
            logger.warning("checkpoint %s is damaged and not used: %s", name, error)
            rejected.append(f"{name}: {error}")
            continue
        if not accept(found):
            continue
        return Found(storage, found.folder, found.manifest, tuple(rejected))
    if rejected:
        raise CheckpointError(
            f"{storage.name} holds {len(rejected)} checkpoint(s), all damaged:\n  " + "\n  ".join(rejected) + "\n"
            "restore one from a copy, or train from the start on purpose: --resume none and an empty folder"
        )
    if not named:
        _warn_of_other_files(storage)
    return None


def _warn_of_other_files(storage: Storage) -> None:
    """Log what a folder without commits contains instead."""
    keys = [entry.key for entry in storage.list("")]
    # Expected files: by default the snapshot folder is inside the milestone folder, and a starting run holds the lock.
    keys = [key for key in keys if not _NESTED.search(key) and key.split("/")[-1] != RUN_LOCK_KEY]
    unfinished = sorted({key.split("/")[1] for key in keys if key.startswith("data/") and key.count("/") > 1})
    if unfinished:
        logger.warning("%s: no committed checkpoint; unfinished saves: %s", storage.name, ", ".join(unfinished))
    elif keys:
        logger.warning("%s: %d files but no checkpoint of this program, such as %s", storage.name, len(keys), keys[0])


def remove(storage: Storage, name: Name) -> None:
    """Delete a checkpoint: its commit first, so that there is never a commit without data."""
    storage.delete(name.commit)
    storage.delete(name.manifest)
    storage.delete_folder(name.folder)


def rotate(
    storage: Storage,
    of: Collection[Kind],
    keep: int,
    known_bad: Collection[str],
    kinds: dict[Name, Kind],
    pinned: str | None = None,
) -> list[Name]:
    """Delete the checkpoints of the kinds `of` older than the newest `keep` undamaged ones; returns their names.

    `kinds`: cache of known kinds, so that each commit is read once; updated in place. `pinned`: one that stays.
    """
    rotating = _of_kinds(storage, of, kinds)
    good = (name for name in rotating if str(name) not in known_bad and _looks_whole(storage, name))
    kept = list(islice(good, keep))
    old = [name for name in rotating if name < kept[-1] and str(name) != pinned] if len(kept) == keep else []
    for name in old:
        remove(storage, name)
        del kinds[name]
    return old


def newest_of(storage: Storage, kind: Kind, kinds: dict[Name, Kind]) -> Manifest | None:
    """The manifest of the newest undamaged checkpoint of `kind`; `kinds` as in `rotate`."""
    for name in _of_kinds(storage, (kind,), kinds):
        with suppress(CheckpointError):
            return inspect(storage, name).manifest
    return None


def _of_kinds(storage: Storage, of: Collection[Kind], kinds: dict[Name, Kind]) -> list[Name]:
    """Newest first. Those whose commit is damaged are of no kind, and so are kept for inspection."""
    names = committed(storage)
    for name in names:
        if name not in kinds:
            with suppress(DamagedError):
                kinds[name] = load_with_crc(Commit, read_bytes(storage, name.commit), name.commit).kind
    return [name for name in names if kinds.get(name) in of]


def _looks_whole(storage: Storage, name: Name) -> bool:
    try:
        inspect(storage, name)
    except CheckpointError:  # damaged, or of another version
        return False
    return True


def sweep(storage: Storage, current: Name | None = None, random: str = "") -> None:
    """Delete files of interrupted saves and probes that are older than ORPHAN_SECONDS, except of the save `current`;
    with `random`, those of any age, of the names with these digits alone."""
    age = -math.inf if random else ORPHAN_SECONDS
    storage.sweep(age, f".{random}" if random else "")
    kept = {name.folder for name in (*committed(storage), current) if name is not None}
    latest: dict[str, float] = {}
    for entry in storage.list(""):
        parts = entry.key.split("/")
        folder = parts[0] if parts[0].startswith("probe-") else "/".join(parts[:2])
        ours = folder.startswith("probe-") or (parts[0] == "data" and len(parts) > 2 and Name.parse(parts[1]))
        if ours and folder.endswith(random) and folder not in kept:
            latest[folder] = max(entry.modified, latest.get(folder, 0.0))
    for folder, modified in latest.items():
        if modified < time.time() - age:
            logger.info("%s: removing %s, left by an interrupted save", storage.name, folder)
            storage.delete_folder(folder)
