"""Lists the checkpoints of a save folder, for tools outside a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from internlm_lite.checkpoint.admin.verify import damages_of
from internlm_lite.checkpoint.format.catalog import committed, inspect
from internlm_lite.checkpoint.format.manifest import Commit, Manifest, Name, load_with_crc, read_bytes
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.errors import CheckpointError, DamagedError


@dataclass(frozen=True)
class Listed:
    """One committed checkpoint."""

    name: Name
    kind: str | None
    """None if neither commit nor manifest is readable."""
    n_bytes: int
    modified: float
    """Modification time of the commit, seconds since the epoch."""
    layout: dict[str, int]
    valid_loss: float | None
    """Of the evaluation that one of the kind "best" was saved for; None: of another kind."""
    problems: tuple[str, ...]
    """Empty if no damage was found."""


@dataclass(frozen=True)
class Unfinished:
    """Data without a commit: a save in progress, or an interrupted one."""

    name: Name
    n_bytes: int
    modified: float
    """Modification time of its newest file, seconds since the epoch."""


def list_checkpoints(storage: Storage, *, deep: bool) -> Iterator[Listed]:
    """Committed checkpoints, newest first. `deep`: verify every byte; else only documents, file sizes and headers."""
    entries = storage.list("")
    modified = {entry.key: entry.modified for entry in entries}
    for name in committed(storage):
        n_bytes = sum(entry.size for entry in entries if entry.key.startswith(f"{name.folder}/"))
        kind, layout, valid_loss = _facts(storage, name)
        problems = [str(damage) for damage in damages_of(storage, name)] if deep else quick_problems(storage, name)
        if problems and storage.size(name.commit) is None:
            continue  # a run has removed it in the meantime
        yield Listed(name, kind, n_bytes, modified.get(name.commit, 0.0), layout, valid_loss, tuple(problems))


def unfinished(storage: Storage) -> list[Unfinished]:
    """Saves without a commit, oldest first."""
    known = set(committed(storage))
    sizes: dict[Name, tuple[int, float]] = {}
    for entry in storage.list("data"):
        name = Name.parse(entry.key.split("/")[1])
        if name is not None and name not in known:
            size, latest = sizes.get(name, (0, 0.0))
            sizes[name] = (size + entry.size, max(latest, entry.modified))
    return [Unfinished(name, *sizes[name]) for name in sorted(sizes)]


def quick_problems(storage: Storage, name: Name) -> list[str]:
    """Descriptions of damage that is found without reading tensors; empty if none."""
    try:
        reader = Reader(inspect(storage, name))
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for file in reader.found.manifest.files:
        try:
            reader.check_file(file)
        except DamagedError as error:
            problems.append(str(error))
    return problems


def _facts(storage: Storage, name: Name) -> tuple[str | None, dict[str, int], float | None]:
    """(kind, layout, validation loss) from the manifest, else the kind alone from the commit, if that is readable."""
    try:
        manifest = load_with_crc(Manifest, read_bytes(storage, name.manifest), name.manifest)
        return manifest.kind, manifest.layout, manifest.state.get("valid_loss")
    except DamagedError:
        pass
    try:
        return load_with_crc(Commit, read_bytes(storage, name.commit), name.commit).kind, {}, None
    except DamagedError:
        return None, {}, None
