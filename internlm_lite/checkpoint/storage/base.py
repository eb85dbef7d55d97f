"""The storage protocol: named objects, on a local disk or in an object store.

Keys are `folder/folder/name` of [A-Za-z0-9._-], no part starting with a dot. Writes are atomic: an object is never
visible in part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from internlm_lite.errors import StorageError

Bytes = bytes | bytearray | memoryview

RUN_LOCK_KEY = "run.lock"
"""Key of the lock in a save folder; see `run_lock`."""
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class UnreadableError(StorageError):
    """One object is absent, too short, or unreadable, while the storage works."""


class ForeignObjectError(UnreadableError):
    """The object is none that was stored here: a folder, a link, or longer than expected."""


class UnreachableError(StorageError):
    """The storage did not answer before the deadline, so further requests would probably time out, too."""


@dataclass(frozen=True)
class StoredObject:
    """Listing entry of one object."""

    key: str
    size: int
    """Bytes."""
    modified: float
    """Seconds since the epoch, by the storage's clock."""


class Storage(Protocol):
    """Methods raise StorageError when the storage fails; reads raise UnreadableError when the object is at fault."""

    name: str
    """Name in messages, such as `local:/runs/a`."""

    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        """Store the concatenated chunks durably, replacing an existing object; returns the bytes written."""

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """Store `data` durably unless the key exists; False if it does, with other data."""

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        """Compare and swap: store `new` if the object holds `old`; False if not, or during another `replace`."""

    def read(self, key: str, limit_bytes: int) -> bytes:
        """The whole object. Raises ForeignObjectError if it is longer than `limit_bytes`."""

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the object's bytes from `start` on. Raises UnreadableError if it ends before."""

    def size(self, key: str) -> int | None:
        """Bytes of the object; None if absent."""

    def list(self, folder: str) -> list[StoredObject]:
        """All objects below `folder` ("" for all), sorted by key. Names that are not valid keys are left out."""

    def delete(self, key: str) -> None:
        """Remove the object; no error if absent."""

    def delete_folder(self, folder: str) -> None:
        """Remove everything below `folder`, including unfinished uploads; no error if absent."""

    def sweep(self, older_than_seconds: float, ending: str = "") -> None:
        """Remove temporary files or uploads of interrupted `put`s that are older than this; with `ending`, only below
        folders `data/*` whose name ends so."""


def check_key(key: str) -> tuple[str, ...]:
    """The segments of a key. Raises StorageError if it is invalid (`..`, absolute, hidden, other characters)."""
    segments = tuple(key.split("/"))
    if not all(_SEGMENT.fullmatch(segment) for segment in segments):
        raise StorageError(
            f"{key!r} is no name for a stored object: expected parts of [A-Za-z0-9._-] separated by '/', "
            "none of them starting with a dot"
        )
    return segments
