"""Finds the checkpoint that a user's path refers to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Name, read_bytes
from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError

_MOST_STEPS = 20


def locate(path: str, s3: S3Config | None = None) -> tuple[str, Name | None]:
    """(storage path, name of the checkpoint in it) for a user's path; name None: the path itself is to be opened.

    FOLDER/100 is the newest checkpoint of step 100 in the save folder. Raises CheckpointError if it has none.
    """
    *parents, last = path.removeprefix("local:").rstrip("/").split("/")
    if last.isdecimal() and not open_storage(path, s3).list(""):
        return find_step(["/".join(parents) or ("/" if parents else ".")], int(last), s3)
    name = Name.parse(last.removesuffix(".json"))
    if name is None:
        return path, None
    if parents[-1:] in (["data"], ["commits"]):
        parents.pop()
    root = "/".join(parents) or ("/" if parents else ".")
    return (root, name) if open_storage(root, s3).size(name.commit) is not None else (path, None)


def find_step(paths: Sequence[str], step: int, s3: S3Config | None = None) -> tuple[str, Name]:
    """(storage path, name) of the newest checkpoint of `step` in these save folders and those inside them.

    Raises CheckpointError naming the steps that there are.
    """
    found: list[tuple[Name, str]] = []
    for path in paths:
        storage = open_storage(path, s3)
        for inside in catalog.folders_in(storage.list("")):
            where = f"{path.rstrip('/')}/{inside}" if inside else path
            found += [(name, where) for name in catalog.committed(storage, inside)]
    wanted = [one for one in found if one[0].step == step]
    if not wanted:
        steps = sorted({name.step for name, _ in found})
        listed = ", ".join(map(str, steps[-_MOST_STEPS:])) or "none"
        raise CheckpointError(
            f"no checkpoint of step {step} in {' and '.join(paths)}; the steps there: "
            f"{'..., ' if steps[_MOST_STEPS:] else ''}{listed}"
        )
    name, where = max(wanted)
    return where, name


def is_save_folder(path: str, s3: S3Config | None = None) -> bool:
    """Whether a user's path refers to a folder of checkpoints and not to one checkpoint."""
    root, name = locate(path, s3)
    return name is None and open_storage(root, s3).size("manifest.json") is None


@read_twice
def open_at(storage: Storage, name: Name | None, known_bad: Mapping[str, str] | None = None) -> Found:
    """The checkpoint that `locate` found; in a save folder the newest, including save folders inside it.

    `known_bad`: see `catalog.newest`. Raises CheckpointError if there is none, DamagedError if it is damaged.
    """
    if name is not None:
        return catalog.inspect(storage, name)
    if storage.size("manifest.json") is not None:
        return catalog.found_in(storage, "", read_bytes(storage, "manifest.json"))
    entries = storage.list("")
    found = catalog.newest(storage, known_bad or {}, catalog.folders_in(entries) or ("",))
    if found is None:
        hint = ""
        if any(entry.key == "config.json" or entry.key.endswith(".safetensors") for entry in entries):
            hint = "; a Hugging Face folder is converted by python tools/convert.py from-hf FOLDER OUT"
        raise CheckpointError(
            f"{storage.name} holds no checkpoint; expected a save folder, or one checkpoint of it{hint}"
        )
    return found
