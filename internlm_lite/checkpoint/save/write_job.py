"""One save as the writer thread sees it: this rank's file, its vote, and on rank 0 the commit.

Nothing is collective, and every failure is told to the thread that trains.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from internlm_lite.checkpoint.format.manifest import Kind, Name
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.plan import Share
from internlm_lite.checkpoint.save.target import Target
from internlm_lite.checkpoint.storage.base import UnreachableError
from internlm_lite.errors import InternLMError, StorageError
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class Saved:
    """How a save ended on this rank. On rank 0 without error: the checkpoint exists."""

    name: Name
    kind: Kind
    error: InternLMError | None


@dataclass
class Write:
    """What is to be written, and how far it is."""

    target: Target
    name: Name
    facts: commit.Facts
    rank: int
    world_size: int
    shares: Sequence[tuple[Share, torch.Tensor]]
    rank_state: dict[str, torch.Tensor]
    vote_timeout_seconds: float
    in_place: bool
    """The shares are the tensors of the model themselves."""
    written: threading.Event = field(default_factory=threading.Event)
    """This rank's part is, or has failed: the tensors are not read any more."""
    abandoned: threading.Event = field(default_factory=threading.Event)
    """Set from outside: waiting for votes is in vain."""
    failure: InternLMError | None = None
    """Of this rank's part."""

    def run(self) -> Saved:
        """Write it. No exception comes out of here."""
        begin, is_main, target = time.monotonic(), self.rank == 0, self.target
        try:
            if is_main:
                target.clear_unfinished()
            size = self._write_part()
            if is_main:
                self._commit()
        except Exception as error:  # noqa: BLE001  the thread's border: training goes on, and is told
            failure = self._for_user(error)
            target.answers = not isinstance(failure, UnreachableError)
            if is_main:
                target.unfinished.append(self.name)
            else:  # rank 0 tells about the checkpoint, we why it failed
                logger.error("rank %d: its part of checkpoint %s was not saved: %s", self.rank, self.name, failure)
            return Saved(self.name, self.facts.kind, failure)
        finally:
            self.written.set()
        target.answers = True
        if is_main:
            took = human_seconds(time.monotonic() - begin)
            logger.info("saved %s checkpoint %s: %s on rank 0, %s", self.facts.kind, self.name, human_bytes(size), took)
            target.tidy(self.name)
        return Saved(self.name, self.facts.kind, None)

    def _write_part(self) -> int:
        storage, name = self.target.storage, self.name
        try:
            size = commit.write_rank(storage, name, self.rank, self.world_size, self.shares, self.rank_state)
        except Exception as error:  # noqa: BLE001  told to rank 0, then by `run`
            self.failure = failure = self._for_user(error)
            if not isinstance(failure, UnreachableError):  # a silent server would not hear that, either
                commit.refuse(storage, name, self.rank, str(failure))
            raise failure from None
        self.written.set()
        return size

    def _commit(self) -> None:
        target, name, size = self.target, self.name, self.world_size
        commit.await_votes(target.storage, name, size, self.vote_timeout_seconds, self.abandoned)
        if target.lease is not None:
            target.lease.check()
        commit.commit_votes(target.storage, name, size, self.facts)

    def _for_user(self, error: Exception) -> InternLMError:
        """The log gets the traceback of an error that nobody thought of."""
        if isinstance(error, InternLMError):
            return error
        logger.error("checkpoint %s: the thread that writes it failed", self.name, exc_info=error)
        return StorageError(f"checkpoint {self.name} could not be written: {type(error).__name__}: {error}")
