"""Folders and files as users have them: loops of links, FIFOs, devices, files that are cut while they are read."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from internlm_lite.errors import DataError, StorageError

KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode), "a device"),
)
FOREIGN = {
    b"PK\x03\x04": "a zip or npz archive",
    b"\x80": "a pickle",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "a numpy array",
    b"MMIDIDX": "an index of a Megatron-LM indexed dataset",
    b"TNTIDX": "an index of the old kind of Megatron-LM and fairseq (lazy, cached)",
    b"version https://git-lfs": "a pointer of Git LFS: git lfs pull",
}
"""First bytes of files that are taken for others."""


def kind_of(path: Path) -> str:
    """What stands at `path`: "a file", "a folder", "a FIFO", ... or "missing"."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "missing"
    except (OSError, ValueError) as error:  # a loop of links, a folder without permission, a zero byte
        return f"unreadable ({getattr(error, 'strerror', None) or error})"
    return next((kind for is_kind, kind in KINDS if is_kind(mode)), "no file")


def require_file(path: Path) -> None:
    """Raises DataError unless `path` is a regular file: a FIFO would block its reader, a device may never end."""
    if (kind := kind_of(path)) != "a file":
        raise DataError(f"{path} is {kind}, expected a file; correct the path, or copy the file again")


def foreign(first_bytes: bytes) -> str:
    """' (a pickle)' if that is what a file with these first bytes is; '' for unknown ones."""
    return next((f" ({kind})" for magic, kind in FOREIGN.items() if first_bytes.startswith(magic)), "")


def walk_once(root: Path) -> Iterator[tuple[Path, list[str], int]]:
    """Each folder at and below `root` once, by name, also where links form a loop.

    Yields (folder, sorted names of its files, number of hidden files and folders, which are left out).
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}; correct its permissions, or remove it")

    seen: set[tuple[int, int]] = set()
    for where, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        shown = sorted(name for name in names if name[0] != ".")
        n_hidden = len(names) - len(shown) + sum(name[0] == "." for name in folders)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        yield Path(where), shown, n_hidden


class TokenFile:
    """Reads parts of a file. No memory map: a mapped file that is cut, or a disk that fails, is a SIGBUS."""

    def __init__(self, path: Path) -> None:
        require_file(path)
        self.path = path
        self._file = path.open("rb", buffering=0)
        self.n_bytes = os.fstat(self._file.fileno()).st_size
        if hasattr(os, "posix_fadvise"):  # documents are read in shuffled order; some file systems know no advice
            with suppress(OSError):
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, start: int, n_bytes: int) -> bytes:
        """Raises DataError when the file has become shorter, StorageError when it cannot be read."""
        try:
            content = os.pread(self._file.fileno(), n_bytes, start)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be read at byte {start} ({error.strerror}); mend it") from None
        if len(content) < n_bytes:
            n_left = os.fstat(self._file.fileno()).st_size
            raise DataError(
                f"{self.path}: was cut while it was in use: found {n_left} bytes, expected {self.n_bytes} as at the "
                f"start; copy it again, and never write to data of a run"
            )
        return content


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
