"""One save in the writer thread: this rank's file, its vote, and on rank 0 the commit.

Nothing is collective; every failure is returned to the training thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from internlm_lite.checkpoint.format.manifest import Kind, Name
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.save_folder import SaveFolder
from internlm_lite.checkpoint.save.write_plan import WriteItem
from internlm_lite.checkpoint.storage.base import UnreachableError
from internlm_lite.errors import InternLMError, StorageError
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class Saved:
    """Outcome of a save on this rank. Without an error on rank 0, the checkpoint exists."""

    name: Name
    kind: Kind
    error: InternLMError | None


@dataclass
class WriteJob:
    """What to write, and the progress."""

    folder: SaveFolder
    name: Name
    facts: commit.Facts
    rank: int
    world_size: int
    items: Sequence[tuple[WriteItem, torch.Tensor]]
    rank_state: dict[str, torch.Tensor]
    vote_timeout_seconds: float
    wait_copied: Callable[[], None]
    """Blocks until the items hold what is to be written."""
    in_place: bool
    """The items are the tensors of the training state, not copies."""
    written: threading.Event = field(default_factory=threading.Event)
    """Set when this rank's part is written or has failed: from then on the tensors are not read."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set by the training thread to stop the wait for votes."""
    failure: InternLMError | None = None
    """The error of this rank's part."""

    def run(self) -> Saved:
        """Write this rank's part and, on rank 0, commit. Returns failures in `Saved` and raises none."""
        begin, is_main, folder = time.monotonic(), self.rank == 0, self.folder
        try:
            if is_main:
                folder.clear_unfinished()
            stream = commit.stream_of(self.items, self.rank_state)
            planned = [item for item, _ in self.items]
            try:
                self.wait_copied()
                size = commit.write_rank(folder.storage, self.name, self.rank, self.world_size, stream, planned)
            except Exception as error:  # noqa: BLE001  as below, and rank 0 learns why there will be no vote
                self.failure = self._as_known(error)
                if not isinstance(self.failure, UnreachableError):  # then a refusal could not be written, either
                    commit.refuse(folder.storage, self.name, self.rank, str(self.failure))
                raise self.failure from None
            self.written.set()
            if is_main:
                self._commit()
        except Exception as error:  # noqa: BLE001  the end of the thread: training continues, and reports it
            return Saved(self.name, self.facts.kind, self._failed(self._as_known(error)))
        finally:
            self.written.set()
        folder.reachable = True
        if is_main:
            took = human_seconds(time.monotonic() - begin)
            logger.info("saved %s checkpoint %s: %s on rank 0, %s", self.facts.kind, self.name, human_bytes(size), took)
            folder.tidy(self.name, self.facts.kind)
        return Saved(self.name, self.facts.kind, None)

    def _commit(self) -> None:
        storage, name, size = self.folder.storage, self.name, self.world_size
        commit.await_votes(storage, name, size, self.vote_timeout_seconds, self.abandoned)
        if self.folder.lease is not None:
            self.folder.lease.check()
        commit.commit_votes(storage, name, size, self.facts)

    def _failed(self, failure: InternLMError) -> InternLMError:
        self.folder.reachable = not isinstance(failure, UnreachableError)
        if self.rank == 0:
            self.folder.unfinished.append(self.name)
        else:  # rank 0 reports that the checkpoint failed, this rank why
            logger.error("rank %d: its part of checkpoint %s was not saved: %s", self.rank, self.name, failure)
        return failure

    def _as_known(self, error: Exception) -> InternLMError:
        """`error` as an InternLMError; logs the traceback of an unexpected one."""
        if isinstance(error, InternLMError):
            return error
        logger.error("checkpoint %s: the thread that writes it failed", self.name, exc_info=error)
        return StorageError(f"checkpoint {self.name} could not be written: {type(error).__name__}: {error}")
