"""Writes checkpoints: the main thread copies, another one does the rest.

    main thread    agree that nobody still writes -> name -> copy to warm host memory         the only stall
    writer thread  this rank's file -> vote -> on rank 0: all votes -> commit -> old snapshots go

Nothing in the writer thread is collective: votes meet in the storage. If the save before is still being written, a new
one is skipped and counted. A failure is an alarm in the log, and training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import Any

import torch

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Kind, Name, check_json, layout_of
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.plan import Holding, Share, describe, share_out
from internlm_lite.checkpoint.save.staging import Staging
from internlm_lite.checkpoint.save.target import Target
from internlm_lite.checkpoint.save.write_job import Saved, Write
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.consensus import on_all, on_main
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_seconds

logger = logging.getLogger("internlm_lite")
_HEARTBEAT_SECONDS = 30.0
_PATIENCE = 3
"""Training waits for a save so many times as long as rank 0 waits for a vote."""
_END_SECONDS = 5.0
"""A thread that was told to give up is waited for so long."""


class Saver:
    """Writes to one folder or several, one checkpoint at a time. Methods are collective unless they say otherwise."""

    def __init__(
        self, mesh: Mesh, config: Mapping[str, Any], vote_timeout_seconds: float, staging_folder: Path | None = None
    ) -> None:
        """`config` is stored in every checkpoint. `vote_timeout_seconds`: for ranks that may be dead; a save that is
        waited for is given three times as long. `staging_folder`: see `staging.Staging`.
        """
        self._mesh, self._config = mesh, dict(config)
        check_json(self._config, "config")
        self._vote_timeout_seconds = vote_timeout_seconds
        self._staging = Staging(staging_folder, mesh.device)
        self._targets: list[Target] = []
        self._last_serial: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Saved] | None = None
        self._write: Write | None = None
        self._untold: list[Saved] = []
        self._held: list[object] = []
        self._shares: list[Share] = []
        self.skipped = 0
        """Saves that were left out because the one before was still being written."""

    def add(self, target: Target) -> None:
        """One more folder; all of them share one numbering."""
        self._targets.append(target)

    def prepare(self, pieces: Sequence[Piece]) -> None:
        """Exchange what is held and make the host memory, ahead of the first save."""
        self._agree(on_all(self._mesh, lambda: [describe(piece) for piece in pieces]))
        self._staging.reserve([share.of(pieces[share.index]) for share in self._shares])

    def save(
        self,
        target: Target,
        step: int,
        kind: Kind,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        rank_state: Mapping[str, torch.Tensor],
        wait: bool,
    ) -> Name | None:
        """Begin a checkpoint; None if it is skipped. `wait`: until it exists, and raise the same error on all ranks.

        Waiting, it reads the tensors where they are, without a copy; so it does where there is no memory for one.
        """
        deadline = self._deadline()
        private = {key: tensor.clone() for key, tensor in rank_state.items()}

        def look() -> list[Holding]:
            self._start_thread()
            if wait:
                self._await_running(deadline)
            return _check_input(step, pieces, state, private)

        if self._agree(on_all(self._mesh, look)):
            self._skip(target, step)
            return None
        name = on_main(self._mesh, lambda: self._begin(target, step))
        parts = [share.of(pieces[share.index]) for share in self._shares]
        self._keep_ended()
        copies = None if wait else self._staging.hold(parts)
        write = Write(
            target=target,
            name=name,
            facts=commit.Facts(kind, layout_of(self._mesh), self._config, state),
            rank=self._mesh.world.rank,
            world_size=self._mesh.world.size,
            shares=list(zip(self._shares, parts if copies is None else copies, strict=True)),
            rank_state=private,
            vote_timeout_seconds=(_PATIENCE if wait else 1) * self._vote_timeout_seconds,
            in_place=copies is None,
        )
        self._write, self._running = write, self._thread.submit(write.run)
        if wait:
            self._finish_now(write, deadline)
        elif write.in_place:
            self._await(write.written.wait, deadline)
        return name

    @property
    def is_stuck(self) -> bool:
        """A save was waited for in vain that still reads the tensors where they are: they must not change any more."""
        return self._write is not None and self._write.in_place and not self._write.written.is_set()

    def finished(self) -> Saved | None:
        """How a save in the background ended, each told once, oldest first; else None. Not collective."""
        self._keep_ended()
        return self._untold.pop(0) if self._untold else None

    def wait(self) -> Saved | None:
        """`finished`, after this rank's save in the background has ended, if it does in time. Not collective."""
        try:
            self._await_running(self._deadline())
        except StorageError as error:
            logger.error("%s", error)
        return self.finished()

    def _keep_ended(self) -> None:
        """What has ended is told later, whatever begins meanwhile."""
        if self._running is not None and self._running.done():
            ended, self._running, self._write = self._running, None, None
            self._untold.append(ended.result())

    def close(self, wait: bool) -> None:
        """End the thread, once it is idle or, without `wait`, as soon as it can. Not collective.

        A thread that hangs is left alone: `runtime.start.end_process` does not wait for it.
        """
        if wait:
            self.wait()
        if self._write is not None:
            self._write.abandoned.set()
        self._thread.shutdown(wait=self._running is None and wait)
        if self._running is None:
            self._staging.close()

    def _agree(self, held: Sequence[Holding]) -> bool:
        """Plan this rank's shares, once for equal holdings. True: some rank is still writing."""
        digest = hashlib.sha256(repr(held).encode()).hexdigest()
        writing = self._running is not None and not self._running.done()
        told: list[Any] = comm.gather_objects((digest, writing), self._mesh.world)
        digests = [theirs for theirs, _ in told]
        if digests != self._held:
            every: list[Any] = comm.gather_objects(list(held), self._mesh.world)
            self._shares = on_all(self._mesh, lambda: share_out(every))[self._mesh.world.rank]
            self._held = digests
        return any(busy for _, busy in told)

    def _skip(self, target: Target, step: int) -> None:
        self.skipped += 1
        if self._mesh.is_main:
            logger.warning(
                "no checkpoint at step %d: the one before is still being written to %s (%d skipped so far); "
                "save less often, or to faster storage",
                step, target.storage.name, self.skipped,
            )  # fmt: skip

    def _begin(self, target: Target, step: int) -> Name:
        """On rank 0: name this one after all there are."""
        if self._last_serial is None:
            for lease in (known.lease for known in self._targets if known.lease is not None):
                lease.check()  # storage that is away looks empty, and names would begin anew
            taken = [name.serial for known in self._targets for name in catalog.committed(known.storage)]
            self._last_serial = max(taken, default=0)
        self._last_serial += 1
        return Name(self._last_serial, step, uuid.uuid4().hex[:6])

    def _start_thread(self) -> None:
        """So that none is needed when ranks have begun to count on each other."""
        try:
            self._thread.submit(int)
        except RuntimeError as error:
            raise StorageError(f"no thread can be started to write a checkpoint: {error}") from error

    def _deadline(self) -> float:
        return time.monotonic() + _PATIENCE * self._vote_timeout_seconds

    def _finish_now(self, write: Write, deadline: float) -> None:
        """Wait for a save of all ranks. A rank that cannot write is known at once, not after the deadline for votes."""

        def own_part() -> None:
            self._await(write.written.wait, deadline)
            _raise(write.failure)

        def end() -> None:
            self._await_running(deadline)
            _raise(self._running.result().error if self._running else None)

        try:
            on_all(self._mesh, own_part)
            on_main(self._mesh, end)
        except InternLMError:
            write.abandoned.set()
            self._end()
            on_main(self._mesh, write.target.clear_unfinished)  # no rank writes any more, or its thread hangs
            raise
        self._end()

    def _end(self) -> None:
        """Forget the save under way, which is not told by `finished` then; one that hangs is kept in mind."""
        if self._running is not None and wait_for([self._running], _END_SECONDS).done:
            self._running = self._write = None

    def _await_running(self, deadline: float) -> None:
        running = self._running
        if running is not None:
            self._await(lambda seconds: bool(wait_for([running], seconds).done), deadline)

    def _await(self, over: Callable[[float], bool], deadline: float) -> None:
        """Until `over(seconds)`, with a word now and then. Raises StorageError at the deadline."""
        begin, name = time.monotonic(), self._write.name if self._write else "?"
        which = f"rank {self._mesh.world.rank}: checkpoint {name}"
        while not over(max(0.0, min(_HEARTBEAT_SECONDS, deadline - time.monotonic()))):
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
    step: int, pieces: Sequence[Piece], state: dict[str, Any], rank_state: Mapping[str, torch.Tensor]
) -> list[Holding]:
    if step < 0:
        raise CheckpointError(f"step {step}: expected 0 or more")
    check_json(state)
    for key, tensor in rank_state.items():
        if tensor.dtype != torch.uint8 or tensor.dim() != 1:
            raise CheckpointError(f"rank_state {key!r}: {tensor.dtype} {list(tensor.shape)}, expected 1-D torch.uint8")
    return [describe(piece) for piece in pieces]
