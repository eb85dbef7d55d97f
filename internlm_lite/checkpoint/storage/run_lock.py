"""A lease on a save folder: one run at a time writes to it.

    run.lock   {owner, host, pid, world, beat}     renewed every RENEW_SECONDS by a thread; removed at the end

It is created only if absent, and changed only by compare and swap (`Storage.replace`): if several runs take over the
same lock, one succeeds. A lock may be taken over when its process does not exist (decidable for the same boot and pid
namespace), or when it does not change for LEASE_SECONDS while we watch it. Clocks of different hosts are not compared.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from internlm_lite.checkpoint.storage.base import RUN_LOCK_KEY, ForeignObjectError, Storage, UnreadableError
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")
RENEW_SECONDS = 15.0
LEASE_SECONDS = 60.0
_LIMIT_BYTES = 4096
_FACTS = {"owner": str, "host": str, "pid": int}
_LARGEST_PID = 2**22
_DIGITS = 6
_REMOVE = "remove it if no run uses this folder"


class Lease:
    """The exclusive right to write to a save folder, held by rank 0 of a run."""

    def __init__(self, storage: Storage, lease_seconds: float = LEASE_SECONDS, renew_seconds: float = RENEW_SECONDS):
        self._storage = storage
        self._lease_seconds, self._renew_seconds = lease_seconds, renew_seconds
        self._owner, self._beat = uuid.uuid4().hex, 0
        self.digits = self._owner[:_DIGITS]
        """In the names of all checkpoints that are written under this lease."""
        self.dead_digits = ""
        """Those of the lease that was taken over because its process, on this machine, is dead; "" if there is none."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Acquire the lease; waits up to `lease_seconds` to see that another run's lock does not change. Raises
        StorageError naming a live holder."""
        acquire([self])

    def take(self, found: bytes | None, since: float) -> None:
        """Replace the lock `found` (None: absent), which was read at `since` by time.monotonic(), by ours, and start
        renewing it. Waits as `acquire` does. Raises StorageError naming a live holder."""
        found = self._watch(found, since)
        if found is None:
            taken = self._storage.put_if_absent(RUN_LOCK_KEY, self._document())
        else:
            taken = self._storage.replace(RUN_LOCK_KEY, found, self._document())
        if not taken:
            raise StorageError(_in_use(self._storage, holder(self._storage)))
        before = {} if found is None else _facts(found)
        if _is_dead(before) and re.fullmatch("[0-9a-f]{32}", before["owner"]):
            self.dead_digits = before["owner"][:_DIGITS]
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises StorageError if another run has taken over (such as after this one was suspended) or the lock is gone
        (such as with an unmounted storage)."""
        self._own_lock()

    def _own_lock(self) -> bytes:
        """Our lock's stored bytes; restores a lock that was deleted alone. Raises as `check` does."""
        found = read_lock(self._storage)
        if found is not None and _facts(found).get("owner") != self._owner:
            found = read_lock(self._storage)  # a bit of the first reading may have been flipped on its way
        if found is None and self._storage.list("commits"):
            if self._storage.put_if_absent(RUN_LOCK_KEY, self._document()):
                logger.warning("%s: this run's lock %s was gone, and is restored", self._storage.name, RUN_LOCK_KEY)
            found = read_lock(self._storage)
        if found is None:
            raise StorageError(
                f"{self._storage.name}: this run's lock {RUN_LOCK_KEY} is gone or cannot be read: was the folder "
                "removed, or its file system unmounted? This run does not write there until it is back"
            )
        if _facts(found).get("owner") != self._owner:
            raise StorageError(_in_use(self._storage, _facts(found)) + "; this run does not write there any more")
        return found

    def release(self) -> None:
        """Stop renewing and remove the lock. Does nothing if the lease was not acquired."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(self._lease_seconds)
            self._thread = None
            with suppress(StorageError):
                self.check()
                self._storage.delete(RUN_LOCK_KEY)

    def _watch(self, found: bytes | None, since: float) -> bytes | None:
        """Returns `found` once its run is known to be dead, None if the lock was removed. Raises StorageError when the
        lock changes."""
        if found is None or _is_dead(_facts(found)):
            return found
        until, facts = since + self._lease_seconds, _facts(found)
        if time.monotonic() < until:
            by = f"{facts['host']} pid {facts['pid']}" if facts else f"an odd run.lock, {found[:60]!r} ({_REMOVE})"
            logger.info(
                "%s is locked by %s: looking for up to %.0f s whether it is alive",
                self._storage.name, by, until - time.monotonic(),
            )  # fmt: skip
        while time.monotonic() < until:
            time.sleep(min(0.5, self._lease_seconds / 10))
            now = read_lock(self._storage)
            if now is None:
                return None
            if now != found and read_lock(self._storage) != found:  # twice, for flipped bits
                raise StorageError(_in_use(self._storage, _facts(now)))
        return found

    def _renew(self) -> None:
        while not self._stop.wait(self._renew_seconds):
            try:
                before = self._own_lock()
                self._beat += 1
                if not self._storage.replace(RUN_LOCK_KEY, before, self._document()):
                    self.check()
            except StorageError as error:  # the next commit checks the lease and fails
                logger.warning("the lease on %s could not be renewed: %s", self._storage.name, error)

    def _document(self) -> bytes:
        facts = {
            "owner": self._owner,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "world": _pid_namespace(),
            "beat": self._beat,
        }
        return json.dumps(facts).encode()


def acquire(leases: Sequence[Lease]) -> None:
    """Acquire all leases or none. Watches the locks of dead runs at the same time, so it takes as long as for one.

    Raises StorageError naming a live holder.
    """
    try:
        seen = [(lease, read_lock(lease._storage), time.monotonic()) for lease in leases]
        for lease, found, since in seen:
            lease.take(found, since)
    except BaseException:
        for lease in leases:
            lease.release()
        raise


@contextmanager
def held(storage: Storage) -> Iterator[None]:
    """Holds the folder's lease inside the block. Raises StorageError naming a live holder."""
    lease = Lease(storage)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()


def read_lock(storage: Storage) -> bytes | None:
    """The lock's stored bytes; None if no lock can be read. Raises StorageError for what no run has written."""
    try:
        return storage.read(RUN_LOCK_KEY, _LIMIT_BYTES)
    except ForeignObjectError as error:
        raise StorageError(f"{error}: an odd lock, which no run has written; {_REMOVE}") from error
    except UnreadableError:
        return None


def holder(storage: Storage) -> dict[str, Any] | None:
    """The lock's facts; None if there is no readable lock, empty if it is damaged."""
    found = read_lock(storage)
    return None if found is None else _facts(found)


def _facts(lock: bytes) -> dict[str, Any]:
    """A lock's facts; empty if it is damaged or odd."""
    try:
        found = json.loads(lock)
    except (ValueError, RecursionError):
        return {}
    known = isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in _FACTS.items())
    return found if known and found["host"].isprintable() and 0 < found["pid"] <= _LARGEST_PID else {}


def _is_dead(found: dict[str, Any]) -> bool:
    """Whether the holder was a process of this host and pid namespace that no longer exists or is a zombie."""
    here = (socket.gethostname(), _pid_namespace())
    if not here[1] or (found.get("host"), found.get("world")) != here:
        return False
    pid = found["pid"]
    try:
        os.kill(pid, 0)
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except ProcessLookupError:
        return True
    except OSError:  # another user's process, or no /proc
        return False
    return status.rpartition(")")[2].split()[0] == "Z"


def _pid_namespace() -> str:
    """Identifies the boot and the pid namespace, within which a pid is unique; "" if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _in_use(storage: Storage, found: dict[str, Any] | None) -> str:
    who = f"host {found.get('host')}, pid {found.get('pid')}" if found else "another run"
    return (
        f"{storage.name} is in use by {who}: expected one run per save folder; stop that run, or choose other "
        "folders (ckpt.save_ckpt_folder, ckpt.snapshot_ckpt_folder)"
    )
