"""Finds the checkpoint that a user's path refers to."""

from __future__ import annotations

from collections.abc import Mapping

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.manifest import Name, read_bytes
from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError


def locate(path: str, s3: S3Config | None = None) -> tuple[str, Name | None]:
    """(storage path, name of the checkpoint in it) for a user's path; name None: the path itself is to be opened."""
    *parents, last = path.removeprefix("local:").rstrip("/").split("/")
    name = Name.parse(last.removesuffix(".json"))
    if name is None:
        return path, None
    if parents[-1:] in (["data"], ["commits"]):
        parents.pop()
    root = "/".join(parents) or ("/" if parents else ".")
    return (root, name) if open_storage(root, s3).size(name.commit) is not None else (path, None)


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
