"""Writes checkpoints: the main thread copies, another one does the rest.

    main thread    agree that no rank still writes -> name -> copy to warm host memory         the only stall
    writer thread  this rank's file -> vote -> on rank 0: all votes -> commit -> old snapshots are removed

Nothing in the writer thread is collective: votes meet in the storage. If the save before is still being written, a new
one is skipped and counted. A failure is an alarm in the log, and training continues.
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
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_seconds

logger = logging.getLogger("internlm_lite")
_HEARTBEAT_SECONDS = 30.0
_PATIENCE = 3
"""Training waits for a save this many times as long as rank 0 waits for a vote."""
_END_SECONDS = 5.0
"""Wait for a thread that was told to give up."""


@dataclass(frozen=True)
class SaveOptions:
    """How checkpoints are written."""

    keep_snapshots: int = 2
    vote_timeout_seconds: float = 600.0
    """For ranks that may be dead; a save that training waits for is given three times as long."""
    staging_folder: Path | None = None
    """See `staging.Staging`."""


class Saver:
    """The saving half of a manager: one checkpoint at a time. Methods are collective unless they say otherwise."""

    def __init__(
        self, mesh: Mesh, config: Mapping[str, Any], folders: Sequence[SaveFolder], options: SaveOptions
    ) -> None:
        """`config` is stored in every checkpoint. `folders` share one numbering: snapshots go into the last, other
        kinds into the first.
        """
        self.mesh, self._config, self.folders = mesh, dict(config), tuple(folders)
        check_json(self._config, "config")
        self._vote_timeout_seconds = options.vote_timeout_seconds
        self._staging = Staging(options.staging_folder, mesh.device)
        self._last_serial: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Saved] | None = None
        self._job: WriteJob | None = None
        self._ended: list[Saved] = []
        self._planned_for: list[object] = []
        self._items: list[WriteItem] = []
        self.skipped = 0
        """Saves that were left out because the one before was still being written."""

    def prepare(self, pieces: Sequence[LocalShard]) -> None:
        """Plan who writes what and make the host memory, ahead of the first save."""
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
        """Write a checkpoint and return its name. `state` counts on rank 0; `rank_state`: uint8 tensors, 1-D.

        `wait`: return when it exists, or raise the same StorageError or CheckpointError on all ranks; older ones are
        safe. Else return as soon as the tensors are copied, None if the save before is still under way. Waiting, or
        where there is no memory for a copy, it reads the tensors in place.
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
        name = on_main(self.mesh, lambda: self._next_name(step))
        tensors = [item.of(pieces[item.index]) for item in self._items]
        self._keep_ended()
        copies = None if wait else self._staging.hold(tensors)
        job = WriteJob(
            folder=folder,
            name=name,
            facts=commit.Facts(kind, layout_of(self.mesh), self._config, state),
            rank=self.mesh.world.rank,
            world_size=self.mesh.world.size,
            items=list(zip(self._items, tensors if copies is None else copies, strict=True)),
            rank_state=private,
            vote_timeout_seconds=(_PATIENCE if wait else 1) * self._vote_timeout_seconds,
            in_place=copies is None,
        )
        self._job, self._running = job, self._thread.submit(job.run)
        if wait:
            self._finish_now(job, deadline)
        elif job.in_place:
            self._await(job.written.wait, deadline)
        return str(name)

    @property
    def write_in_progress(self) -> bool:
        """A save timed out that still reads the tensors in place: they must not change any more."""
        return self._job is not None and self._job.in_place and not self._job.written.is_set()

    @property
    def reachable(self) -> bool:
        """False: the last save to one of the folders timed out. Not collective."""
        return all(folder.reachable for folder in self.folders)

    def finished(self) -> Saved | None:
        """How a save in the background ended, each once, oldest first; else None. Not collective."""
        self._keep_ended()
        return self._ended.pop(0) if self._ended else None

    def wait(self) -> Saved | None:
        """`finished`, after this rank's save in the background has ended, if it does in time. Not collective."""
        try:
            self._await_running(self._deadline())
        except StorageError as error:
            logger.error("%s", error)
        return self.finished()

    def release(self, *, unreachable: bool = True) -> None:
        """Give back the leases, those of `unreachable` folders, too. Not collective."""
        for folder in self.folders:
            if folder.lease is not None and (unreachable or folder.reachable):
                folder.lease.release()

    def close(self, *, wait: bool) -> None:
        """End the thread, once it is idle or, without `wait`, as soon as it can, and give back the leases. Not
        collective; a second time does nothing.

        Without `wait` an unreachable storage is not asked again: the next run finds that this one is dead. A thread
        that hangs is left alone: `runtime.start.end_process` does not wait for it.
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
        """What has ended is reported by `finished`, whatever begins meanwhile."""
        if self._running is not None and self._running.done():
            ended, self._running, self._job = self._running, None, None
            self._ended.append(ended.result())

    def _plan(self, held: Sequence[ShardDescriptor]) -> bool:
        """Plan what this rank writes, once for equal shards. True: some rank is still writing."""
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

    def _next_name(self, step: int) -> Name:
        """On rank 0: a name newer than all that exist."""
        if self._last_serial is None:
            for folder in self.folders:
                if folder.lease is not None:
                    folder.lease.check()  # storage that is away looks empty, and serials would begin at 1 again
            taken = [name.serial for folder in self.folders for name in catalog.committed(folder.storage)]
            self._last_serial = max(taken, default=0)
        self._last_serial += 1
        return Name(self._last_serial, step, uuid.uuid4().hex[:6])

    def _start_thread(self) -> None:
        """So that none has to be started when ranks already count on each other."""
        try:
            self._thread.submit(int)
        except RuntimeError as error:
            raise StorageError(f"no thread can be started to write a checkpoint: {error}") from error

    def _deadline(self) -> float:
        return time.monotonic() + _PATIENCE * self._vote_timeout_seconds

    def _finish_now(self, job: WriteJob, deadline: float) -> None:
        """Wait for a save of all ranks. A rank that cannot write is known at once, not after the deadline for votes."""

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
            on_main(self.mesh, job.folder.clear_unfinished)  # no rank writes any more, or its thread hangs
            raise
        self._forget_running()

    def _forget_running(self) -> None:
        """`finished` does not report the save under way; one that hangs is kept in mind."""
        if self._running is not None and wait_for([self._running], _END_SECONDS).done:
            self._running = self._job = None

    def _await_running(self, deadline: float) -> None:
        running = self._running
        if running is not None:
            self._await(lambda seconds: bool(wait_for([running], seconds).done), deadline)

    def _await(self, done: Callable[[float], bool], deadline: float) -> None:
        """Wait until `done(seconds)`, with a warning now and then. Raises StorageError at the deadline."""
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
