"""Writes checkpoints: the main thread copies, another one does the rest.

    main thread    agree that nobody still writes -> name -> copy to warm host memory         the only stall
    writer thread  this rank's file -> vote -> on rank 0: all votes -> commit -> old snapshots go

Nothing in the writer thread is collective: votes meet in the storage. If the save before is still being written, a new
one is skipped and counted. A failure is an alarm in the log, and training goes on.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from internlm_lite.checkpoint import commit, find
from internlm_lite.checkpoint.agree import on_all, on_main
from internlm_lite.checkpoint.format import Kind, Name, check_json
from internlm_lite.checkpoint.lease import Lease
from internlm_lite.checkpoint.share import Holding, Share, describe, share_out
from internlm_lite.checkpoint.staging import Staging
from internlm_lite.checkpoint.storage import Storage
from internlm_lite.errors import CheckpointError, InternLMError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")


@dataclass
class Target:
    """A save folder, on rank 0 with what is known about it."""

    storage: Storage
    keep_snapshots: int
    lease: Lease | None
    bad: dict[str, str]
    """Checkpoints found damaged, and why; they do not count when old ones are removed."""
    unfinished: list[Name] = field(default_factory=list)
    """Failed saves whose files may still lie there."""
    swept: bool = False


@dataclass(frozen=True)
class Saved:
    """How a save ended on this rank. On rank 0 without error: the checkpoint exists."""

    name: Name
    kind: Kind
    error: InternLMError | None


class Saver:
    """Writes to one folder or several, one checkpoint at a time. Methods are collective unless they say otherwise."""

    def __init__(
        self, mesh: Mesh, config: Mapping[str, Any], vote_timeout_seconds: float, staging_folder: Path | None = None
    ) -> None:
        """`config` is stored in every checkpoint. `staging_folder`: see `staging.Staging`."""
        self._mesh, self._config = mesh, dict(config)
        check_json(self._config, "config")
        self._vote_timeout_seconds = vote_timeout_seconds
        self._staging = Staging(staging_folder, mesh.device)
        self._targets: list[Target] = []
        self._last_serial: int | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Saved] | None = None
        self._untold: list[Saved] = []
        self._failure: InternLMError | None = None
        self._written = threading.Event()
        self._abandoned = threading.Event()
        self._held: list[object] = []
        self._shares: list[Share] = []
        self.skipped = 0
        """Saves that were left out because the one before was still being written."""

    def add(self, target: Target) -> None:
        """One more folder; all of them share one numbering."""
        self._targets.append(target)

    @property
    def layout(self) -> dict[str, int]:
        return {"world": self._mesh.world.size, **asdict(self._mesh.sizes)}

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

        Waiting, it reads the tensors where they are, without a copy.
        """
        private = {key: tensor.clone() for key, tensor in rank_state.items()}
        held = on_all(self._mesh, lambda: _check_input(step, pieces, state, private))
        if wait and self._running is not None:
            self._running.exception()
        if self._agree(held):
            self._skip(target, step)
            return None
        name = on_main(self._mesh, lambda: self._begin(target, step))
        parts = [share.of(pieces[share.index]) for share in self._shares]
        copies = parts if wait else self._staging.hold(parts)
        facts = commit.Facts(kind, self.layout, self._config, state)
        self._failure = None
        self._written.clear()
        self._abandoned.clear()
        mine = list(zip(self._shares, copies, strict=True))
        self._keep_ended()
        self._running = self._thread.submit(self._write, target, name, facts, mine, private)
        if wait:
            self._finish_now(target)
        return name

    def finished(self) -> Saved | None:
        """How a save in the background ended, each told once, oldest first; else None. Not collective."""
        self._keep_ended()
        return self._untold.pop(0) if self._untold else None

    def wait(self) -> Saved | None:
        """`finished`, after this rank's save in the background has ended. Not collective."""
        if self._running is not None:
            self._running.exception()
        return self.finished()

    def _keep_ended(self) -> None:
        """What has ended is told later, whatever begins meanwhile."""
        if self._running is not None and self._running.done():
            ended, self._running = self._running, None
            self._untold.append(ended.result())

    def close(self, wait: bool) -> None:
        """End the thread, once it is idle or, without `wait`, as soon as it can. Not collective."""
        if not wait:
            self._abandoned.set()
        self._thread.shutdown(wait=wait)

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
            taken = [name.serial for known in self._targets for name in find.committed(known.storage)]
            self._last_serial = max(taken, default=0)
        self._last_serial += 1
        return Name(self._last_serial, step, uuid.uuid4().hex[:6])

    def _finish_now(self, target: Target) -> None:
        """Wait for a save of all ranks. A rank that cannot write is known at once, not after the deadline for votes."""
        self._written.wait()
        try:
            on_all(self._mesh, lambda: _raise(self._failure))
            saved = self._end()
            on_main(self._mesh, lambda: _raise(None if saved is None else saved.error))
        except InternLMError:
            self._abandoned.set()
            self._end()
            on_main(self._mesh, lambda: _clear_unfinished(target))  # no rank writes any more
            raise

    def _end(self) -> Saved | None:
        """Wait for the save under way, which is not told by `finished` then; None if there is none."""
        running, self._running = self._running, None
        return None if running is None else running.result()

    def _write(
        self,
        target: Target,
        name: Name,
        facts: commit.Facts,
        mine: list[tuple[Share, torch.Tensor]],
        private: dict[str, torch.Tensor],
    ) -> Saved:
        """All that follows the copy, in the writer thread."""
        begin, rank = time.monotonic(), self._mesh.world.rank
        if self._mesh.is_main:
            _clear_unfinished(target)
        try:
            size = self._write_file(target, name, mine, private)
            if self._mesh.is_main:
                self._commit(target, name, facts)
                took = human_seconds(time.monotonic() - begin)
                logger.info("saved %s checkpoint %s: %s on rank 0, %s", facts.kind, name, human_bytes(size), took)
                _tidy(target, name)
        except InternLMError as error:
            if self._mesh.is_main:
                target.unfinished.append(name)
            else:  # rank 0 tells about the checkpoint, we why it failed
                logger.error("rank %d: its part of checkpoint %s was not saved: %s", rank, name, error)
            return Saved(name, facts.kind, error)
        return Saved(name, facts.kind, None)

    def _write_file(
        self,
        target: Target,
        name: Name,
        mine: list[tuple[Share, torch.Tensor]],
        private: dict[str, torch.Tensor],
    ) -> int:
        world = self._mesh.world
        try:
            return commit.write_rank(target.storage, name, world.rank, world.size, mine, private)
        except InternLMError as error:
            self._failure = error
            commit.refuse(target.storage, name, world.rank, str(error))
            raise
        finally:
            self._written.set()

    def _commit(self, target: Target, name: Name, facts: commit.Facts) -> None:
        size = self._mesh.world.size
        commit.await_votes(target.storage, name, size, self._vote_timeout_seconds, self._abandoned)
        if target.lease is not None:
            target.lease.check()
        commit.commit_votes(target.storage, name, size, facts)


def _clear_unfinished(target: Target) -> None:
    """Remove what failed saves left, while no rank writes to them any more."""
    with suppress(StorageError):
        while target.unfinished:
            find.remove(target.storage, target.unfinished[-1])
            target.unfinished.pop()


def _tidy(target: Target, name: Name) -> None:
    """After a commit that was read back. Failing here harms nothing."""
    try:
        gone = find.rotate(target.storage, target.keep_snapshots, target.bad)
        if gone:
            logger.info("removed old snapshots: %s", ", ".join(map(str, gone)))
        if not target.swept:
            find.sweep(target.storage, name)
            target.swept = True
    except StorageError as error:
        logger.warning("removing old checkpoints failed: %s", error)


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
