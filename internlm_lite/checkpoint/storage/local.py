"""Storage in a folder of a file system. An object is written to a hidden temporary file in the same folder, fsynced and
renamed, and the folder is fsynced: after a crash the object exists completely or not at all.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from internlm_lite.checkpoint.storage.base import Bytes, StoredObject, UnreadableError, check_key
from internlm_lite.errors import StorageError

_TEMPORARY = ".tmp-"
_GROUPS = ("data/*", "probe-*")
"""Folders of one save or one probe, which `sweep` removes when empty; it leaves other folders."""
_WRITE_BYTES = 1024 * 1024
"""Bytes per write. Writes of 4 MB to ext4's large folios took ten times longer while another thread hashed."""
_HINTS = {
    errno.ENOSPC: "the disk is full: free space or choose another folder",
    errno.EDQUOT: "the quota is used up: free space or choose another folder",
    errno.EROFS: "the file system is read-only: choose another folder",
    errno.EACCES: "no permission: change the folder's permissions or choose another one",
    errno.EPERM: "no permission: change the folder's permissions or choose another one",
    errno.ENOENT: "it does not exist here",
    errno.EIO: "the medium failed",
    errno.ENOTDIR: "a part of the path is a file, not a folder: choose another folder",
}
# Errors of file systems that cannot fsync a folder, or have no hard links or no locks.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EMLINK)


class LocalStorage:
    """`Storage` of files below `root`. Creates folders when needed; rejects symbolic links inside."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.name = f"local:{self.root}"

    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        with self._errors("write", key):
            path = self._writable(key)
            with _temporary(path, chunks) as (temporary, written):
                os.rename(temporary, path)
            _flush_folder(path.parent)
            return written

    def put_if_absent(self, key: str, data: bytes) -> bool:
        with self._errors("write", key):
            path = self._writable(key)
            if path.exists():
                return False
            with _temporary(path, [data]) as (temporary, _):
                try:
                    os.link(temporary, path)  # unlike rename, it fails if `path` exists
                except FileExistsError:
                    return False
                except OSError as error:
                    if error.errno not in _NOT_SUPPORTED:
                        raise
                    os.rename(temporary, path)
            _flush_folder(path.parent)
            return True

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        with self._errors("write", key):
            path = self._path(key)
            try:
                with open(path, "r+b") as file:
                    if not _try_lock(file.fileno()):
                        return False
                    # A writer replaces the file while it holds the old file's lock; check that this is still the file.
                    is_current = os.path.samestat(os.fstat(file.fileno()), path.lstat())
                    if not is_current or file.read(len(old) + 1) != old:
                        return False
                    with _temporary(path, [new]) as (temporary, _):
                        os.rename(temporary, path)
                    _flush_folder(path.parent)
                    return True
            except FileNotFoundError:
                return False

    def read(self, key: str, limit_bytes: int) -> bytes:
        with self._errors("read", key), self._open(key) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit_bytes:
                raise UnreadableError(f"{self.name}/{key}: {size} bytes, expected at most {limit_bytes}")
            data = bytearray(size)
            self._fill(key, descriptor, 0, memoryview(data))
            return bytes(data)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        with self._errors("read", key), self._open(key) as descriptor:
            self._fill(key, descriptor, start, buffer)

    def size(self, key: str) -> int | None:
        with self._errors("look up", key):
            try:
                found = self._path(key).lstat()
            except (FileNotFoundError, NotADirectoryError):
                return None
            return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, folder: str) -> list[StoredObject]:
        entries = []
        with self._errors("list", folder):
            top = self._path(folder) if folder else self.root
            for parent, names in _walk(top):
                for name in names:
                    key = (parent / name).relative_to(self.root).as_posix()
                    with suppress(StorageError, FileNotFoundError):  # invalid keys; files removed in the meantime
                        check_key(key)
                        found = (parent / name).lstat()
                        entries.append(StoredObject(key, found.st_size, found.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        with self._errors("delete", key):
            path = self._path(key)
            with suppress(FileNotFoundError):
                path.unlink()
                _flush_folder(path.parent)

    def delete_folder(self, folder: str) -> None:
        with self._errors("delete", folder):
            path = self._path(folder)
            with suppress(FileNotFoundError):
                shutil.rmtree(path)
                _flush_folder(path.parent)

    def sweep(self, older_than_seconds: float) -> None:
        limit = time.time() - older_than_seconds
        with self._errors("clean", ""):
            groups = {path for pattern in _GROUPS for path in self.root.glob(pattern)}
            for parent in filter(self._is_folder, (self.root, self.root / "commits", self.root / "data", *groups)):
                with suppress(FileNotFoundError):
                    unused = parent.stat().st_mtime < limit  # read before `unlink` changes it
                    for path in parent.glob(f"{_TEMPORARY}*"):
                        if path.lstat().st_mtime < limit:
                            path.unlink()
                    if unused and parent in groups:
                        _remove_if_empty(parent)

    def _is_folder(self, path: Path) -> bool:
        """Whether `path` is a folder, without a symbolic link between it and the root."""
        return path.is_dir() and path.resolve() == self.root.resolve() / path.relative_to(self.root)

    def _path(self, key: str) -> Path:
        """The file of a key. Raises StorageError for an invalid key, UnreadableError if a part is a symbolic link."""
        path = self.root
        for segment in check_key(key):
            path = path / segment
            if path.is_symlink():
                raise UnreadableError(
                    f"{path} is a symbolic link: checkpoints hold none; replace it by what it points to"
                )
        return path

    def _writable(self, key: str) -> Path:
        path = self._path(key)
        _make_folder(path.parent)
        return path

    @contextmanager
    def _open(self, key: str) -> Iterator[int]:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UnreadableError(f"{self.name}/{key} is not a regular file")
            yield descriptor
        finally:
            os.close(descriptor)

    def _fill(self, key: str, descriptor: int, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(descriptor, [buffer[done:]], start + done)
            if count == 0:
                raise UnreadableError(f"{self.name}/{key} ends at byte {start + done}, expected {start + len(buffer)}")
            done += count

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        """Turn an OSError into a StorageError, or an UnreadableError if a read failed because of the object."""
        where = f"{self.name}/{key}" if key else self.name
        try:
            yield
        except OSError as error:
            lost = verb == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO)
            hint = _HINTS.get(error.errno or 0, "see the system's log")
            kind = UnreadableError if lost else StorageError
            raise kind(f"cannot {verb} {where}: {error.strerror} ({hint})") from error


@contextmanager
def _temporary(path: Path, chunks: Iterable[Bytes]) -> Iterator[tuple[Path, int]]:
    """Yields (temporary file in the folder of `path` with the chunks, fsynced; its size). Removed at the end."""
    temporary = path.with_name(f"{_TEMPORARY}{uuid.uuid4().hex[:12]}")
    written = 0
    try:
        with open(temporary, "xb", buffering=0) as file:
            for chunk in chunks:
                rest = memoryview(chunk)
                while len(rest):
                    count = file.write(rest[:_WRITE_BYTES])
                    _begin_flush(file.fileno(), written, count)
                    rest = rest[count:]
                    written += count
            os.fsync(file.fileno())
        yield temporary, written
    finally:
        with suppress(OSError):
            temporary.unlink()


def _begin_flush(descriptor: int, start: int, count: int) -> None:
    """Start writeback of these bytes while the next are computed, so that the final fsync is short."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)  # drops only clean pages


def _try_lock(descriptor: int) -> bool:
    """Lock the file until it is closed; False if another process holds the lock. True if locks are not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (*_NOT_SUPPORTED, errno.ENOLCK)
    return True


def _make_folder(path: Path) -> None:
    """Create a folder and its parents, and fsync them. Several ranks may call it at the same time."""
    if path.is_dir():
        return
    if path.parent != path:
        _make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir()
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    _flush_folder(path.parent)


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NOT_SUPPORTED:
            raise
    finally:
        os.close(descriptor)


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) below `top`, without following symbolic links; empty if `top` does not exist."""

    def check(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for parent, _, names in os.walk(top, onerror=check):
        yield Path(parent), names
