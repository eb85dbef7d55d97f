"""Which checkpoints a folder holds, which of them are whole, and which are removed.

Names alone order them (see `manifest.Name`). A checkpoint is inspected without reading tensors: commit and manifest by
their hashes, every other file by its size. load/ compares the rest as it reads.
"""

from __future__ import annotations

import hashlib
import logging
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
from internlm_lite.checkpoint.format.regions import tiling_problems
from internlm_lite.checkpoint.storage.base import RUN_LOCK_KEY, Storage, StoredObject
from internlm_lite.config.schema import Config
from internlm_lite.errors import CheckpointError, DamagedError

logger = logging.getLogger("internlm_lite")
_COMMIT = re.compile(r"(?:(?P<folder>.+)/)?commits/(?P<name>[^/]+)\.json")
_NESTED = re.compile(r"/(?:commits/[^/]+\.json$|data/)")
ORPHAN_SECONDS = 3600.0
"""Age at which the leftovers of an interrupted save are removed: until then its writer may be alive."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that looks whole."""

    storage: Storage
    folder: str
    """Key of its data folder; "" when it is the storage's root."""
    manifest: Manifest
    rejected: tuple[str, ...] = ()
    """Newer checkpoints that were passed over, and why."""

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def order(self) -> int:
        """Rises with every save, also after a rollback to an earlier step."""
        name = Name.parse(self.name)
        return name.serial if name else 0

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def manifest_path(self) -> str:
        """For messages."""
        return f"{self.storage.name}/{self.key('manifest.json')}"

    def config(self) -> Config:
        """What it was saved with. Raises CheckpointError."""
        try:
            return Config.model_validate(self.manifest.config)
        except ValidationError as error:
            raise CheckpointError(
                f"checkpoint {self.name}: this version cannot read the config it was saved with: "
                f"{error.error_count()} unknown or wrong keys, first {'.'.join(map(str, error.errors()[0]['loc']))}"
            ) from error

    def key(self, file: str) -> str:
        return f"{self.folder}/{file}" if self.folder else file


def committed(storage: Storage, inside: str = "") -> list[Name]:
    """Names of all commits, newest first. `inside`: "" or a save folder in this one, as `folders_in` has it."""
    folder = _below(inside, "commits")
    keys = (entry.key.removeprefix(f"{folder}/").removesuffix(".json") for entry in storage.list(folder))
    return sorted((name for name in map(Name.parse, keys) if name is not None), reverse=True)


def folders_in(entries: Iterable[StoredObject]) -> list[str]:
    """Save folders below a folder of these entries, "" for itself: snapshots have one of their own by default."""
    matches = (_COMMIT.fullmatch(entry.key) for entry in entries)
    return sorted({match["folder"] or "" for match in matches if match and Name.parse(match["name"])})


def _below(inside: str, key: str) -> str:
    return f"{inside}/{key}" if inside else key


def inspect(storage: Storage, name: Name, inside: str = "") -> Found:
    """A committed checkpoint. Raises DamagedError naming the file that is not as it was written."""
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
    """The checkpoint whose manifest holds `data`, all its files there in full size. Raises DamagedError."""
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
    """The newest checkpoint of the save folders that looks whole; None if nothing was ever committed there.

    `known_bad`: name -> reason, found bad while loading; `accept`: others are passed over silently. Raises
    CheckpointError if there are only bad ones.
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
    """For a folder without commits that is not empty."""
    keys = [entry.key for entry in storage.list("")]
    # By default the snapshot folder lies inside the milestone folder, and a run that starts holds the lock.
    keys = [key for key in keys if not _NESTED.search(key) and key.split("/")[-1] != RUN_LOCK_KEY]
    unfinished = sorted({key.split("/")[1] for key in keys if key.startswith("data/") and key.count("/") > 1})
    if unfinished:
        logger.warning("%s: no committed checkpoint; unfinished saves: %s", storage.name, ", ".join(unfinished))
    elif keys:
        logger.warning("%s: %d files but no checkpoint of this program, such as %s", storage.name, len(keys), keys[0])


def remove(storage: Storage, name: Name) -> None:
    """Delete a checkpoint, in the order that never leaves a commit without its data."""
    storage.delete(name.commit)
    storage.delete(name.manifest)
    storage.delete_folder(name.folder)


def rotate(storage: Storage, keep: int, known_bad: Collection[str], kinds: dict[Name, Kind]) -> list[Name]:
    """Delete all snapshots older than the newest `keep` good ones; other kinds but rescues stay. Returns what is gone.

    `kinds`: those known already, so that each commit is read once; updated here.
    """
    names = committed(storage)
    for name in names:
        if name not in kinds:
            with suppress(DamagedError):  # evidence for a person to look at
                kinds[name] = load_with_crc(Commit, read_bytes(storage, name.commit), name.commit).kind
    temporary = [name for name in names if kinds.get(name) in ("snapshot", "rescue")]
    good = (name for name in temporary if str(name) not in known_bad and _looks_whole(storage, name))
    kept = list(islice(good, keep))
    old = [name for name in temporary if name < kept[-1]] if len(kept) == keep else []
    for name in old:
        remove(storage, name)
        del kinds[name]
    return old


def _looks_whole(storage: Storage, name: Name) -> bool:
    try:
        inspect(storage, name)
    except CheckpointError:  # damaged, or of another version
        return False
    return True


def sweep(storage: Storage, current: Name) -> None:
    """Delete what interrupted saves and probes left behind."""
    storage.sweep(ORPHAN_SECONDS)
    kept = {name.folder for name in [*committed(storage), current]}
    latest: dict[str, float] = {}
    for entry in storage.list(""):
        parts = entry.key.split("/")
        folder = parts[0] if parts[0].startswith("probe-") else "/".join(parts[:2])
        ours = folder.startswith("probe-") or (parts[0] == "data" and len(parts) > 2 and Name.parse(parts[1]))
        if ours and folder not in kept:
            latest[folder] = max(entry.modified, latest.get(folder, 0.0))
    for folder, modified in latest.items():
        if modified < time.time() - ORPHAN_SECONDS:
            logger.info("%s: removing %s, left by an interrupted save", storage.name, folder)
            storage.delete_folder(folder)
