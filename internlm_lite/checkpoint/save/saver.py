"""Writes checkpoints: the main thread copies tensors, a writer thread does the rest.

    main thread    agree that no rank still writes -> name -> copy to reserved host memory     training waits for this
    writer thread  this rank's file -> vote -> on rank 0: all votes -> commit -> remove old snapshots

On CUDA the copy is enqueued, and the writer thread waits for it. That thread runs no collectives; ranks communicate by
votes in the storage. If the previous save is still being written, a new one is skipped and counted. A failure in the
background does not stop training.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Kind, Name, check_json, layout_of
from internlm_lite.checkpoint.format.shards import ShardDescriptor, describe
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.save_folder import SaveFolder
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.checkpoint.save.write_job import Saved, WriteJob
from internlm_lite.checkpoint.save.write_plan import WriteItem, plan_writes
from internlm_lite.checkpoint.storage.run_lock import Lease
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.runtime.device import use_device
from internlm_lite.units import human_seconds

logger = logging.getLogger("internlm_lite")
_HEARTBEAT_SECONDS = 30.0
_PATIENCE = 3
"""Timeout of a save that training waits for, as a multiple of the timeout for votes."""
_END_SECONDS = 5.0
"""How long to wait for the writer thread after `abandoned` is set."""


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are written."""

    keep_snapshots: int = 2
    keep_milestones: int | None = None
    """None: all."""
    vote_timeout_seconds: float = 600.0
    """How long rank 0 waits for votes; three times as long in a save that training waits for."""
    staging_folder: Path | None = None
    """See `staging.Staging`."""


class Saver:
    """The saving half of `CheckpointManager`: one save at a time. Methods are collective unless stated otherwise."""

    def __init__(
        self, mesh: Mesh, config: Mapping[str, Any], folders: Sequence[SaveFolder], options: SaveOptions
    ) -> None:
        """`config` is stored in every checkpoint. Snapshots go to the last of `folders`, other kinds to the first;
        all folders share one sequence of serial numbers."""
        self.mesh, self._config, self.folders = mesh, dict(config), tuple(folders)
        check_json(self._config, "config")
        self._vote_timeout_seconds = options.vote_timeout_seconds
        self._staging = Staging(options.staging_folder, mesh.device)
        self._last_serial: int | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint", use_device, (mesh.device,))
        self._running: Future[Saved] | None = None
        self._job: WriteJob | None = None
        self._ended: list[Saved] = []
        self._planned_for: list[object] = []
        self._items: list[WriteItem] = []
        self.skipped = 0
        """Number of saves skipped because the previous one was still being written."""

    def prepare(self, pieces: Sequence[LocalShard]) -> None:
        """Plan which rank writes which elements and reserve host memory, so that the first save is fast."""
        self._plan(on_all(self.mesh, lambda: [describe(piece) for piece in pieces]))
        self._staging.reserve([item.of(pieces[item.index]) for item in self._items])

    def save(
        self,
        step: int,
        kind: Kind,
        pieces: Sequence[LocalShard],
        state: dict[str, Any],
        rank_state: Mapping[str, torch.Tensor] | None = None,
        *,
        wait: bool = True,
    ) -> str | None:
        """Write a checkpoint and return its name. `state`: JSON-able, rank 0's is stored; `rank_state`: 1-D uint8.

        `wait`: read the tensors in place and return when the checkpoint exists, or raise the same StorageError or
        CheckpointError on all ranks. Otherwise return when the tensors are copied (written, if there is no memory for
        copies), on CUDA when that is enqueued, see `allow_changes`; None if the previous save is still being written.
        """
        folder, deadline = self.folders[-1 if kind == "snapshot" else 0], self._deadline()
        private = {key: tensor.clone() for key, tensor in (rank_state or {}).items()}

        def look() -> list[ShardDescriptor]:
            self._start_thread()
            if wait:
                self._await_running(deadline)
            return _check_input(step, pieces, state, private)

        if self._plan(on_all(self.mesh, look)):
            self._skip(folder, step)
            return None
        name = on_main(self.mesh, lambda: self._next_name(step, folder.lease))
        tensors = [item.of(pieces[item.index]) for item in self._items]
        self._keep_ended()
        copies = None if wait else self._staging.copy(tensors)
        job = WriteJob(
            folder=folder,
            name=name,
            facts=commit.Facts(kind, layout_of(self.mesh), self._config, state),
            rank=self.mesh.world.rank,
            world_size=self.mesh.world.size,
            items=list(zip(self._items, tensors if copies is None else copies, strict=True)),
            rank_state=private,
            vote_timeout_seconds=(_PATIENCE if wait else 1) * self._vote_timeout_seconds,
            wait_copied=self._staging.wait_copied,
            in_place=copies is None,
        )
        self._job, self._running = job, self._thread.submit(job.run)
        if wait:
            self._finish_now(job, deadline)
        elif job.in_place:
            self._await(job.written.wait, deadline)
        return str(name)

    def allow_changes(self) -> None:
        """Work enqueued from now on may change the tensors of the last save. Not collective; does not wait."""
        self._staging.allow_changes()

    @property
    def write_in_progress(self) -> bool:
        """A save that timed out still reads the tensors in place, so they must not change. Not collective."""
        return self._job is not None and self._job.in_place and not self._job.written.is_set()

    @property
    def reachable(self) -> bool:
        """False: the last save to one of the folders timed out. Not collective."""
        return all(folder.reachable for folder in self.folders)

    def finished(self) -> Saved | None:
        """The outcome of a background save that has ended, each once, oldest first; else None. Not collective."""
        self._keep_ended()
        return self._ended.pop(0) if self._ended else None

    def wait(self) -> Saved | None:
        """Wait for this rank's background save, until a timeout, then return `finished()`. Not collective."""
        try:
            self._await_running(self._deadline())
        except StorageError as error:
            logger.error("%s", error)
        return self.finished()

    def release(self, *, unreachable: bool = True) -> None:
        """Release the leases; those of unreachable folders only if `unreachable`. Not collective."""
        for folder in self.folders:
            if folder.lease is not None and (unreachable or folder.reachable):
                folder.lease.release()

    def close(self, *, wait: bool) -> None:
        """End the writer thread and release the leases. `wait`: finish the save in progress first. Not collective; a
        second call does nothing.

        Without `wait`, leases on unreachable storage are left; the next run detects that this one is dead. A hanging
        thread is left running, because `runtime.start.end_process` does not wait for it.
        """
        if wait:
            self.wait()
        if self._job is not None:
            self._job.abandoned.set()
        self._thread.shutdown(wait=self._running is None and wait)
        if self._running is None:
            self._staging.close()
        self.release(unreachable=wait)

    def _keep_ended(self) -> None:
        """Store the outcome of a background save that has ended, for `finished`, before another one starts."""
        if self._running is not None and self._running.done():
            ended, self._running, self._job = self._running, None, None
            self._ended.append(ended.result())

    def _plan(self, held: Sequence[ShardDescriptor]) -> bool:
        """Plan what this rank writes, unless the shards are those of the last plan. Returns whether a rank is still
        writing. Collective."""
        digest = hashlib.sha256(repr(held).encode()).hexdigest()
        writing = self._running is not None and not self._running.done()
        gathered: list[Any] = comm.gather_objects((digest, writing), self.mesh.world)
        digests = [theirs for theirs, _ in gathered]
        if digests != self._planned_for:
            every: list[Any] = comm.gather_objects(list(held), self.mesh.world)
            self._items = on_all(self.mesh, lambda: plan_writes(every))[self.mesh.world.rank]
            self._planned_for = digests
        return any(busy for _, busy in gathered)

    def _skip(self, folder: SaveFolder, step: int) -> None:
        self.skipped += 1
        if self.mesh.is_main:
            logger.warning(
                "no checkpoint at step %d: the one before is still being written to %s (%d skipped so far); "
                "save less often, or to faster storage",
                step, folder.storage.name, self.skipped,
            )  # fmt: skip

    def _next_name(self, step: int, lease: Lease | None) -> Name:
        """A name with a larger serial number than all existing ones, and the digits of `lease`. On rank 0."""
        if self._last_serial is None:
            for folder in self.folders:
                if folder.lease is not None:
                    folder.lease.check()  # unmounted storage looks empty, and serials would restart at 1
            taken = [name.serial for folder in self.folders for name in catalog.committed(folder.storage)]
            self._last_serial = max(taken, default=0)
        self._last_serial += 1
        return Name(self._last_serial, step, lease.digits if lease else uuid.uuid4().hex[:6])

    def _start_thread(self) -> None:
        """Start the thread early: a failure to start it must be raised before ranks rely on each other's votes."""
        try:
            self._thread.submit(int)
        except RuntimeError as error:
            raise StorageError(f"no thread can be started to write a checkpoint: {error}") from error

    def _deadline(self) -> float:
        return time.monotonic() + _PATIENCE * self._vote_timeout_seconds

    def _finish_now(self, job: WriteJob, deadline: float) -> None:
        """Wait for the save on all ranks. Exchanges write errors first, which is faster than the timeout for votes."""

        def own_part() -> None:
            self._await(job.written.wait, deadline)
            _raise(job.failure)

        def end() -> None:
            self._await_running(deadline)
            _raise(self._running.result().error if self._running else None)

        try:
            on_all(self.mesh, own_part)
            on_main(self.mesh, end)
        except InternLMError:
            job.abandoned.set()
            self._forget_running()
            on_main(self.mesh, job.folder.clear_unfinished)  # no rank is writing, except a thread that hangs
            raise
        self._forget_running()

    def _forget_running(self) -> None:
        """Keep `finished` from reporting the save in progress; it stays recorded as running if its thread hangs."""
        if self._running is not None and wait_for([self._running], _END_SECONDS).done:
            self._running = self._job = None

    def _await_running(self, deadline: float) -> None:
        running = self._running
        if running is not None:
            self._await(lambda seconds: bool(wait_for([running], seconds).done), deadline)

    def _await(self, done: Callable[[float], bool], deadline: float) -> None:
        """Call `done(seconds)`, which blocks up to `seconds`, until true; warns every _HEARTBEAT_SECONDS. Raises
        StorageError at the deadline."""
        begin, name = time.monotonic(), self._job.name if self._job else "?"
        which = f"rank {self.mesh.world.rank}: checkpoint {name}"
        while not done(max(0.0, min(_HEARTBEAT_SECONDS, deadline - time.monotonic()))):
            waited = human_seconds(time.monotonic() - begin)
            if time.monotonic() >= deadline:
                raise StorageError(
                    f"{which} is still being written after another {waited}: the storage hangs or is too slow; look at "
                    "it, or give it longer with --timeout"
                )
            logger.warning("%s is still being written: waiting for it since %s", which, waited)


def _raise(error: InternLMError | None) -> None:
    if error is not None:
        raise error


def _check_input(
    step: int, pieces: Sequence[LocalShard], state: dict[str, Any], rank_state: Mapping[str, torch.Tensor]
) -> list[ShardDescriptor]:
    if step < 0:
        raise CheckpointError(f"step {step}: expected 0 or more")
    check_json(state)
    for key, tensor in rank_state.items():
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError(f"rank_state {key!r}: {tensor.dtype} {list(tensor.shape)}, expected 1-D torch.uint8")
    return [describe(piece) for piece in pieces]
