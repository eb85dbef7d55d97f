"""Who writes to a save folder: one run at a time.

    run.lock   {owner, host, pid, world, beat}     renewed every RENEW_SECONDS by a thread; removed at the end

A lock whose process is gone (of the same boot and pid namespace, where its pid means something), or that does not
change for LEASE_SECONDS while we watch, is taken over. Only changes are compared, never clocks of two hosts.

Removing a lock removes whichever is there by then, so of several runs that watched the same one, a later one may remove
that of the first. Still one alone goes on: each looks again SETTLE_SECONDS after it has written its own lock; and who
took longer than that to remove one waits, before it writes, until a run that it may have robbed has renewed its lock.
The lock of a process that is gone is no exception: two runs that begin on its host find it at the same time. As the one
that looks again does not know how the other one judged the lock, both times are the same for all: short, as every start
after a crash takes so long, and longer than a removal takes where the storage is not slow.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")
KEY = "run.lock"
RENEW_SECONDS = 15.0
LEASE_SECONDS = 60.0
"""Taking over from a dead run takes so long; half as much more where the storage is slow."""
SETTLE_SECONDS = 0.5
_LIMIT_BYTES = 4096
_Watched = tuple[dict[str, Any] | None, float]
"""The lock of another run, if there was one, and since when it is watched, by time.monotonic()."""


class Lease:
    """The right to write to a folder, for rank 0 of a run."""

    def __init__(self, storage: Storage, lease_seconds: float = LEASE_SECONDS, renew_seconds: float = RENEW_SECONDS):
        self._storage = storage
        self._lease_seconds, self._renew_seconds = lease_seconds, renew_seconds
        self._owner = uuid.uuid4().hex
        self._beat = 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self) -> _Watched:
        """Begin to look for a sign of life of the run whose lock is there."""
        return holder(self._storage), time.monotonic()

    def acquire(self) -> None:
        """Take the lease, waiting for a dead run's to run out. Raises StorageError naming the run that is alive."""
        acquire([self])

    def put(self, watched: _Watched) -> bool:
        """Write our lock, and renew it from now on. True: in the place of another one; `check` after SETTLE_SECONDS.

        Raises StorageError naming the run that is alive.
        """
        found, since = watched
        if found is not None:
            self._displace(found, 0.0 if _is_dead(found) else since + self._lease_seconds)
        if not self._storage.put_if_absent(KEY, self._document()):
            raise StorageError(_taken(self._storage, holder(self._storage)))
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()
        return found is not None

    def check(self) -> None:
        """Raises StorageError when another run has taken over, for instance after this one was suspended, or when the
        lock is gone, for instance with the storage.
        """
        found = holder(self._storage)
        if found is None and self._storage.list("commits") and self._storage.put_if_absent(KEY, self._document()):
            logger.warning("%s: this run's lock %s was gone, and is written anew", self._storage.name, KEY)
            return
        if found is None:
            raise StorageError(
                f"{self._storage.name}: this run's lock {KEY} is gone or cannot be read: was the folder removed, or "
                "its file system unmounted? This run does not write there until it is back"
            )
        if found.get("owner") != self._owner:
            raise StorageError(_taken(self._storage, found) + "; this run does not write there any more")

    def release(self) -> None:
        """Give the folder free and join the thread; nothing where the lease was not taken."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._lease_seconds)
            self._thread = None
            with suppress(StorageError):
                self.check()
                self._storage.delete(KEY)

    def _displace(self, found: dict[str, Any], until: float) -> None:
        """Remove a lock that does not change before `until`; raise when it does."""
        if time.monotonic() < until:
            logger.info(
                "%s is locked by %s pid %s: looking for up to %.0f s whether it is alive",
                self._storage.name, found.get("host"), found.get("pid"), until - time.monotonic(),
            )  # fmt: skip
        while time.monotonic() < until:
            time.sleep(min(0.5, self._lease_seconds / 10))
            if not self._stays(found):
                return
        looked = time.monotonic()
        if self._stays(found):
            self._storage.delete(KEY)
        if time.monotonic() - looked > SETTLE_SECONDS:
            time.sleep(self._lease_seconds / 2)  # see above; runs renew their locks twice as often

    def _stays(self, found: dict[str, Any]) -> bool:
        """True for that lock, False for none. Raises StorageError when it is another one."""
        now = holder(self._storage)
        if now is not None and now != found:
            raise StorageError(_taken(self._storage, now))
        return now is not None

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            self._beat += 1
            try:
                self.check()
                self._storage.put(KEY, [self._document()])
            except StorageError as error:  # the commit checks again and refuses
                logger.warning("the lease on %s could not be renewed: %s", self._storage.name, error)

    def _document(self) -> bytes:
        facts = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world": _world(),
            "beat": self._beat,
        }
        return json.dumps(facts).encode()


def acquire(leases: Sequence[Lease]) -> None:
    """Take them all, or none, in the time of one: dead runs' locks are watched side by side.

    Raises StorageError naming the run that is alive.
    """
    try:
        watched = [lease.watch() for lease in leases]
        replaced = [lease.put(lock) for lease, lock in zip(leases, watched, strict=True)]
        if any(replaced):
            time.sleep(SETTLE_SECONDS)
            for lease in leases:
                lease.check()
    except BaseException:
        for lease in leases:
            lease.release()
        raise


@contextmanager
def held(storage: Storage) -> Iterator[None]:
    """The folder is ours inside. Raises StorageError naming the run that has it."""
    lease = Lease(storage)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()


def holder(storage: Storage) -> dict[str, Any] | None:
    """What the lock says; None without one. A damaged lock is a lock without facts."""
    try:
        found = json.loads(storage.read(KEY, _LIMIT_BYTES))
    except UnreadableError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host that is gone."""
    pid = found.get("pid")
    here = (socket.gethostname(), _world())
    if not here[1] or (found.get("host"), found.get("world")) != here or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _state(pid) == "Z"


def _world() -> str:
    """Where a pid names one process: this boot of this kernel, and the pid namespace in it. "" where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _state(pid: int) -> str:
    """One letter as in /proc; "" where there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _taken(storage: Storage, found: dict[str, Any] | None) -> str:
    who = f"host {found.get('host')}, pid {found.get('pid')}" if found else "another run"
    return (
        f"{storage.name} is in use by {who}: expected one run per save folder; stop that run, or choose other "
        "folders (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder)"
    )
