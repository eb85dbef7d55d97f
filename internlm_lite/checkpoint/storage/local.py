"""Storage in a folder of a file system. An object is written to a hidden temporary file in the same folder, fsynced and
renamed, and the folder is fsynced: after a crash the object exists completely or not at all.

An error that may pass is met by doing the whole operation again: a second fsync of the same bytes would report success
although the first has dropped them. So every operation may find that it was done already.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

from internlm_lite.checkpoint.storage.base import Bytes, ForeignObjectError, StoredObject, UnreadableError, check_key
from internlm_lite.checkpoint.storage.retry import FailedAttempt, keep_trying
from internlm_lite.errors import StorageError

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

DEADLINE_SECONDS = 20.0
"""How long errors that may pass are met by trying again."""
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
    errno.ESTALE: "the file server forgot it: mount the file system again",
    errno.ETIMEDOUT: "the file server does not answer",
    errno.ENOTCONN: "the file system lost its server: mount it again",
    errno.ESHUTDOWN: "the file system lost its server: mount it again",
}
# Errors of media and file servers after which another attempt may succeed.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN)
# Errors of file systems that cannot fsync a folder, or have no hard links or no locks.
_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.ENOSYS, errno.EMLINK)
_NO_FOLDER_FSYNC = (*_NOT_SUPPORTED, errno.EBADF, errno.EISDIR, errno.EACCES)


def _repeated(verb: str) -> Callable[[F], F]:
    """Makes a method of a key try again and raise StorageError; it tries once if it gets an iterator, which cannot be
    read again.
    """

    def decorate(method: F) -> F:
        @wraps(method)
        def call(storage: LocalStorage, key: str, *arguments: Any, **named: Any) -> Any:
            once = any(isinstance(argument, Iterator) for argument in arguments)
            return storage._run(verb, key, partial(method, storage, key, *arguments, **named), once=once)

        return cast(F, call)

    return decorate


class LocalStorage:
    """`Storage` of files below `root`. Creates folders when needed; rejects symbolic links inside."""

    def __init__(self, root: Path, deadline_seconds: float = DEADLINE_SECONDS) -> None:
        self.root = root.expanduser().absolute()
        self.name = f"local:{self.root}"
        self.deadline_seconds = deadline_seconds

    @_repeated("write")
    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        path = self._writable(key)
        with _temporary(path, chunks) as (temporary, written):
            _rename(temporary, path)
        _flush_folder(path.parent)
        return written

    @_repeated("write")
    def put_if_absent(self, key: str, data: bytes) -> bool:
        path = self._writable(key)
        with _temporary(path, [data]) as (temporary, _):
            try:
                os.link(temporary, path)  # unlike rename, it fails if `path` exists
            except OSError as error:
                if temporary.stat().st_nlink < 2:  # 2: made, but the answer of NFS was lost
                    if (
                        isinstance(error, FileExistsError) or path.exists()
                    ):  # of an earlier attempt, or of another writer
                        return self.size(key) == len(data) and self.read(key, len(data)) == data
                    if error.errno not in _NOT_SUPPORTED:
                        raise
                    _rename(temporary, path)
        _flush_folder(path.parent)
        return True

    @_repeated("write")
    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        path = self._path(key)
        try:
            with open(path, "r+b") as file:
                if not _try_lock(file.fileno()):
                    return False
                # A writer replaces the file while it holds the old file's lock; check that this is still the file.
                found = file.read(max(len(old), len(new)) + 1)
                if not os.path.samestat(os.fstat(file.fileno()), path.lstat()) or found not in (old, new):
                    return False
                if found == old:
                    with _temporary(path, [new]) as (temporary, _):
                        _rename(temporary, path)
                _flush_folder(path.parent)
                return True
        except FileNotFoundError:
            return False

    @_repeated("read")
    def read(self, key: str, limit_bytes: int) -> bytes:
        with self._open(key) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > limit_bytes:
                raise ForeignObjectError(f"{self.name}/{key}: {size} bytes, expected at most {limit_bytes}")
            data = bytearray(size)
            self._fill(key, descriptor, 0, memoryview(data))
            return bytes(data)

    @_repeated("read")
    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        with self._open(key) as descriptor:
            self._fill(key, descriptor, start, buffer)

    @_repeated("look up")
    def size(self, key: str) -> int | None:
        try:
            found = self._path(key).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    @_repeated("list")
    def list(self, folder: str) -> list[StoredObject]:
        entries = []
        for parent, names in _walk(self._path(folder) if folder else self.root):
            for name in names:
                key = (parent / name).relative_to(self.root).as_posix()
                with suppress(StorageError, FileNotFoundError):  # invalid keys; files removed in the meantime
                    check_key(key)
                    found = (parent / name).lstat()
                    entries.append(StoredObject(key, found.st_size, found.st_mtime))
        return sorted(entries, key=lambda entry: entry.key)

    @_repeated("delete")
    def delete(self, key: str) -> None:
        path = self._path(key)
        with suppress(FileNotFoundError):
            path.unlink(missing_ok=True)
            _flush_folder(path.parent)

    @_repeated("delete")
    def delete_folder(self, folder: str) -> None:
        path = self._path(folder)
        with suppress(FileNotFoundError):
            if path.exists():
                shutil.rmtree(path)
            _flush_folder(path.parent)

    def sweep(self, older_than_seconds: float, ending: str = "") -> None:
        self._run("clean", "", partial(self._sweep, time.time() - older_than_seconds, ending))

    def _sweep(self, limit: float, ending: str) -> None:
        groups = {path for pattern in _GROUPS for path in self.root.glob(f"{pattern}{ending}")}
        others = () if ending else (self.root, self.root / "commits", self.root / "data")
        for parent in filter(self._is_folder, (*others, *groups)):
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
                raise ForeignObjectError(
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
                raise ForeignObjectError(f"{self.name}/{key} is not a regular file")
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

    def _run(self, verb: str, key: str, request: Callable[[], T], *, once: bool = False) -> T:
        """`request()`, repeated while its OSError may pass. Raises UnreadableError if a read failed because of the
        object, else StorageError."""
        where = f"{self.name}/{key}" if key else self.name

        def judge(error: Exception) -> FailedAttempt:
            assert isinstance(error, OSError)
            lost = verb == "read" and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EIO)
            hint = _HINTS.get(error.errno or 0, "see the system's log")
            return FailedAttempt(
                text=f"cannot {verb} {where}: {error.strerror or error} ({hint})",
                error=UnreadableError if lost else StorageError,
                passing=error.errno in _PASSING and not once,
            )

        return keep_trying(request, (OSError,), judge, self.deadline_seconds)


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
    """Start writeback of these bytes while the next are computed, so that the final fsync is short. A hint only."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)  # drops only clean pages


def _rename(temporary: Path, path: Path) -> None:
    """Rename. NFS answers ENOENT if it has renamed the file already and its first answer was lost."""
    before = temporary.stat()
    try:
        os.rename(temporary, path)
    except FileNotFoundError:
        if not os.path.samestat(before, path.lstat()):
            raise


def _try_lock(descriptor: int) -> bool:
    """Lock the file until it is closed; False if another process holds the lock. True if locks are not supported."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (*_NOT_SUPPORTED, errno.ENOLCK):
            raise
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
    try:
        _flush_folder(path.parent)
    except OSError:
        with suppress(OSError):
            path.rmdir()  # so that the next attempt flushes again
        raise


def _remove_if_empty(path: Path) -> None:
    try:
        path.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def _flush_folder(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_FSYNC:
            raise


def _walk(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) below `top`, without following symbolic links; empty if `top` does not exist."""

    def check(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for parent, _, names in os.walk(top, onerror=check):
        yield Path(parent), names
