"""Save and load the training state of all ranks: the face of this package. Every method is collective.

save     exchange what is held -> each rank writes its share and votes -> rank 0 commits -> old snapshots go
resume   newest commit -> check -> fill the pieces, any layout from any layout; if damaged, the one before
"""

from __future__ import annotations

import hashlib
import logging
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from internlm_lite.checkpoint import commit, find
from internlm_lite.checkpoint.agree import on_all, on_main
from internlm_lite.checkpoint.backends import open_storage
from internlm_lite.checkpoint.find import Found
from internlm_lite.checkpoint.format import Kind, Manifest, Name, check_json, seal, unseal
from internlm_lite.checkpoint.load import Reader
from internlm_lite.checkpoint.report import Wanted, load_plan, mismatch
from internlm_lite.checkpoint.share import Holding, Share, describe, share_out
from internlm_lite.checkpoint.storage import Storage, UnreadableError
from internlm_lite.checkpoint.tensorfile import DamagedError
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import CheckpointError, ConfigError, StorageError
from internlm_lite.mesh import comm
from internlm_lite.mesh.layout import Piece
from internlm_lite.mesh.mesh import Mesh
from internlm_lite.units import human_bytes, human_seconds

logger = logging.getLogger("internlm_lite")


@dataclass(frozen=True)
class Restored:
    """What a load gives back besides the filled tensors."""

    found: Found
    state: dict[str, Any]
    """As it was given to `save` on rank 0."""
    rank_state: dict[str, torch.Tensor] | None
    """What this rank gave to `save`; None if fewer ranks saved."""
    missing_roles: tuple[str, ...]
    """Roles the checkpoint does not have: their tensors are untouched."""


class CheckpointManager:
    """Checkpoints of one save folder.

    Construction probes a writable folder on all ranks and raises StorageError before any training is done. `config` is
    the resolved config without secrets; it is stored, and compared on load.
    """

    def __init__(
        self,
        folder: str,
        mesh: Mesh,
        *,
        config: Mapping[str, Any] | None = None,
        keep_snapshots: int = 2,
        vote_timeout_seconds: float = 600.0,
        writable: bool = True,
        s3: S3Config | None = None,
    ) -> None:
        if keep_snapshots < 2:
            raise ConfigError(f"keep_snapshots={keep_snapshots}: expected at least 2, one to fall back to")
        self.mesh = mesh
        self._s3 = s3
        self.storage = open_storage(folder, s3)
        self._config = dict(config or {})
        check_json(self._config, "config")
        self._keep = keep_snapshots
        self._timeout = vote_timeout_seconds
        self._held: list[object] = []
        self._shares: list[Share] = []
        self._bad: dict[str, str] = {}
        self._beside: list[CheckpointManager] = []
        self._swept = False
        if writable:
            _probe(self.storage, mesh)

    @property
    def layout(self) -> dict[str, int]:
        return {"world": self.mesh.world.size, **asdict(self.mesh.sizes)}

    def save(
        self,
        step: int,
        kind: Kind,
        pieces: Sequence[Piece],
        state: dict[str, Any],
        rank_state: Mapping[str, torch.Tensor] | None = None,
    ) -> str:
        """Write a checkpoint and return its name. `state` counts on rank 0; `rank_state`: uint8 tensors, 1-D.

        Raises the same StorageError or CheckpointError on all ranks if it could not be committed; older ones are safe.
        """
        begin = time.monotonic()
        private = dict(rank_state or {})
        held = on_all(self.mesh, lambda: _check_input(step, pieces, state, private))
        shares = self._plan(held)
        name = on_main(self.mesh, lambda: self._next_name(step))
        facts = commit.Facts(kind, self.layout, self._config, state)
        world = self.mesh.world
        try:
            mine = [(share, share.of(pieces[share.index])) for share in shares]
            size = on_all(
                self.mesh, lambda: commit.write_rank(self.storage, name, world.rank, world.size, mine, private)
            )
            on_main(self.mesh, lambda: self._commit(name, facts))
        except (StorageError, CheckpointError):
            if self.mesh.is_main:  # no rank writes any more
                with suppress(StorageError):
                    find.remove(self.storage, name)
            raise
        if self.mesh.is_main:
            took = time.monotonic() - begin
            logger.info("saved %s checkpoint %s: %s on rank 0, %s", kind, name, human_bytes(size), human_seconds(took))
            self._tidy(name)
        return str(name)

    def latest(self) -> Found | None:
        """The newest checkpoint that looks whole, None if nothing was ever committed here.

        Raises CheckpointError when there are only damaged ones: a folder with checkpoints is never taken for empty.
        """
        return self._agree_on(self.storage, lambda: find.newest(self.storage, self._bad))

    def open(self, path: str) -> Found:
        """The checkpoint at `path`: a save folder (its newest good one), `.../commits/NAME.json`, `.../data/NAME`, or a
        copy of such a data folder. Raises CheckpointError if there is none, or it is damaged.
        """
        place = on_main(self.mesh, lambda: find.locate(path, self._s3))
        storage = open_storage(place[0], self._s3)
        found = self._agree_on(storage, lambda: find.open_at(storage, *place[1:]))
        assert found is not None
        return found

    def load(self, found: Found, pieces: Sequence[Piece], allow_missing_roles: Collection[str] = ()) -> Restored:
        """Fill the pieces' tensors in place, cast to their dtype; roles that no rank asks for are not read.

        Raises the same error on all ranks: CheckpointError with the differing tensors and config keys if the checkpoint
        belongs to another model, DamagedError with file and tensor (the tensors are then partly overwritten).
        """
        reader = Reader(found)
        manifest = found.manifest
        wanted = self._wanted(pieces)
        problem = mismatch(found, wanted, allow_missing_roles, self._config)
        if problem:
            raise CheckpointError(problem)
        rank, size = self.mesh.world.rank, self.mesh.world.size

        def read() -> dict[str, torch.Tensor] | None:
            for file in list(manifest.files)[rank::size]:
                reader.check_file(file)
            for piece in pieces:
                describe(piece)
                if piece.role in manifest.tensors:
                    reader.fill(piece)
            return reader.rank_state(rank)

        if self.mesh.is_main:
            states = min(size, len(manifest.rank_state))
            logger.info("%s", load_plan(found, wanted, self.layout, states, self._config))
        begin = time.monotonic()
        private = on_all(self.mesh, read)
        if self.mesh.is_main:
            took = human_seconds(time.monotonic() - begin)
            logger.info("loaded checkpoint %s: %s read by rank 0, %s", found.name, human_bytes(reader.bytes_read), took)
        missing = tuple(role for role in wanted if role not in manifest.tensors)
        return Restored(found, manifest.state, private, missing)

    def number_with(self, other: CheckpointManager) -> None:
        """Treat both folders as one history: one numbering, and `resume` takes the newest. Call it on both."""
        self._beside.append(other)

    def resume(self, pieces: Sequence[Piece], allow_missing_roles: Collection[str] = ()) -> Restored | None:
        """Load the newest checkpoint that proves good, of this folder and those it is numbered with; None if none was
        ever committed.

        A damaged one is reported and the one before is tried. Raises CheckpointError if only damaged ones are left, or
        if the newest belongs to another model.
        """
        while (newest := self._newest()) is not None:
            manager, found = newest
            try:
                return manager.load(found, pieces, allow_missing_roles)
            except DamagedError as error:
                manager._bad[found.name] = str(error)
        return None

    def _newest(self) -> tuple[CheckpointManager, Found] | None:
        candidates: list[tuple[CheckpointManager, Found]] = []
        unusable: CheckpointError | None = None
        for manager in (self, *self._beside):
            try:
                found = manager.latest()
            except CheckpointError as error:  # the other folder may hold a good one
                unusable = error
                continue
            if found is not None:
                candidates.append((manager, found))
        if unusable is not None and not candidates:
            raise unusable
        if unusable is not None and self.mesh.is_main:
            logger.warning("%s", unusable)
        return max(candidates, key=lambda candidate: candidate[1].order, default=None)

    def _plan(self, held: Sequence[Holding]) -> list[Share]:
        """This rank's shares. What ranks hold does not change in a run, so they exchange it once."""
        digest = hashlib.sha256(repr(held).encode()).hexdigest()
        digests = comm.gather_objects(digest, self.mesh.world)
        if digests != self._held:
            every: list[Any] = comm.gather_objects(list(held), self.mesh.world)
            self._shares = on_all(self.mesh, lambda: share_out(every))[self.mesh.world.rank]
            self._held = digests
        return self._shares

    def _next_name(self, step: int) -> Name:
        taken = [name.serial for manager in (self, *self._beside) for name in find.committed(manager.storage)]
        serial = max(taken, default=0) + 1
        return Name(serial, step, uuid.uuid4().hex[:6])

    def _commit(self, name: Name, facts: commit.Facts) -> None:
        size = self.mesh.world.size
        commit.await_votes(self.storage, name, size, self._timeout)
        commit.commit_votes(self.storage, name, size, facts)

    def _tidy(self, name: Name) -> None:
        """On rank 0, after a commit that was read back. Failing here harms nothing."""
        try:
            gone = find.rotate(self.storage, self._keep, self._bad)
            if gone:
                logger.info("removed old snapshots: %s", ", ".join(map(str, gone)))
            if not self._swept:
                find.sweep(self.storage, name)
                self._swept = True
        except StorageError as error:
            logger.warning("removing old checkpoints failed: %s", error)

    def _agree_on(self, storage: Storage, look: Any) -> Found | None:
        """What rank 0 finds, on all ranks; manifests travel as they are stored."""

        def pack() -> tuple[str, bytes, tuple[str, ...]] | None:
            found = look()
            return found and (found.folder, seal(found.manifest), found.rejected)

        packed = on_main(self.mesh, pack)
        if packed is None:
            return None
        folder, data, rejected = packed
        return Found(storage, folder, unseal(Manifest, data, storage.name), rejected)

    def _wanted(self, pieces: Sequence[Piece]) -> Wanted:
        """What all ranks together want."""
        mine = {(piece.role, piece.name): tuple(piece.shape) for piece in pieces}
        wanted: dict[str, dict[str, tuple[int, ...]]] = {}
        every: list[Any] = comm.gather_objects(mine, self.mesh.world)
        for theirs in every:
            for (role, name), shape in theirs.items():
                wanted.setdefault(role, {})[name] = shape
        return wanted


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


def _probe(storage: Storage, mesh: Mesh) -> None:
    """Every rank writes a small object and reads rank 0's: the folder is writable, and the same one for all."""
    word = uuid.uuid4().bytes

    def put(key: str) -> None:
        try:
            storage.put(key, [word])
        except StorageError as error:
            raise StorageError(
                f"{error}; expected a folder that every rank can write: change ckpt.save_ckpt_folder or "
                "ckpt.snapshot_ckpt_folder, or the rights"
            ) from error

    def begin() -> str:
        folder = f"probe-{word.hex()}"
        put(f"{folder}/rank-00000")
        return folder

    folder = on_main(mesh, begin)

    def check() -> None:
        if not mesh.is_main:
            put(f"{folder}/rank-{mesh.rank:05d}")
        try:
            storage.read(f"{folder}/rank-00000", limit_bytes=len(word))
        except UnreadableError as error:
            raise StorageError(
                f"{storage.name} is not one folder for all ranks: what rank 0 wrote there is not seen ({error}); "
                "use a folder on storage that all nodes share"
            ) from error

    try:
        on_all(mesh, check)
    finally:
        if mesh.is_main:
            with suppress(StorageError):
                storage.delete_folder(folder)
