"""Where checkpoints are stored: named objects. One protocol for the local disk and for object stores.

Keys are `folder/folder/name` of [A-Za-z0-9._-], no part starting with a dot. An object appears whole or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from internlm_lite.errors import StorageError

Bytes = bytes | bytearray | memoryview

RUN_LOCK_KEY = "run.lock"
"""In a save folder: which run writes to it. See `run_lock`."""
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class UnreadableError(StorageError):
    """This object is absent, too short, or cannot be read back from its medium: the object is at fault."""


class UnreachableError(StorageError):
    """The storage did not answer before the deadline: other requests would wait as long, in vain."""


@dataclass(frozen=True)
class StoredObject:
    """One stored object."""

    key: str
    size: int
    """Bytes."""
    modified: float
    """Seconds since the epoch, by the storage's clock."""


class Storage(Protocol):
    """Methods raise StorageError when the storage refuses; reading raises UnreadableError when the object is bad."""

    name: str
    """For messages, such as `local:/runs/a`."""

    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        """Store the chunks, one after another, durably; returns the bytes written."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store `data` durably unless the key exists; False if it does."""

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """Compare and swap: store `new` if the object holds `old`. False if it does not, or another replaces it now."""

    def read(self, key: str, limit_bytes: int) -> bytes:
        """The whole object, which is at most `limit_bytes` long."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` on."""

    def size(self, key: str) -> int | None:
        """Bytes of the object; None if absent."""

    def list(self, folder: str) -> list[StoredObject]:
        """All objects below `folder` ("" for all), sorted by key. Other names are left out."""

    def delete(self, key: str) -> None:
        """Remove the object; fine if absent."""

    def delete_folder(self, folder: str) -> None:
        """Remove everything below `folder`, unfinished objects too; fine if absent."""

    def sweep(self, older_than_seconds: float) -> None:
        """Remove the leftovers of interrupted `put`s that are that old."""


def check_key(key: str) -> tuple[str, ...]:
    """The segments of a key. Raises StorageError if it is not one (`..`, absolute, hidden, odd characters)."""
    segments = tuple(key.split("/"))
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise StorageError(
            f"{key!r} is no name for a stored object: expected parts of [A-Za-z0-9._-] separated by '/', "
            "none of them starting with a dot"
        )
    return segments
