"""The commit protocol: every rank writes its file, then its vote; rank 0 waits for all votes, writes the manifest and,
last, the commit, which makes the checkpoint exist. Overwrites no file. No collectives, so any thread may run it.

    data/<name>/{rank-00003.safetensors, rank-00003.vote.json, manifest.json}   commits/<name>.json
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from internlm_lite.checkpoint.format.catalog import inspect
from internlm_lite.checkpoint.format.manifest import (
    FORMAT,
    Commit,
    Kind,
    Manifest,
    ManifestFile,
    Name,
    StoredShard,
    StoredState,
    TensorEntry,
    Vote,
    VotedShard,
    dump_with_crc,
    file_of,
    load_with_crc,
    read_bytes,
    versions,
)
from internlm_lite.checkpoint.format.read_twice import read_twice
from internlm_lite.checkpoint.format.regions import tiling_problems
from internlm_lite.checkpoint.format.tensor_file import TensorFile
from internlm_lite.checkpoint.save.write_plan import WriteItem
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.errors import CheckpointError, DamagedError, StorageError

logger = logging.getLogger("internlm_lite")
_REASON_BYTES = 4000
_REASONS = 8
"""Maximum number of distinct reasons reported; on a full disk every rank has its own, naming its file."""
_LONGEST_POLL_SECONDS = 0.5
_RANK_STATE = "rank_state/"
"""Key prefix of a rank's private tensors in its file."""


@dataclass(frozen=True)
class Facts:
    """Contents of the manifest besides the tensors and files."""

    kind: Kind
    layout: dict[str, int]
    config: dict[str, Any]
    state: dict[str, Any]


def stream_of(items: Sequence[tuple[WriteItem, torch.Tensor]], rank_state: Mapping[str, torch.Tensor]) -> TensorFile:
    """The stream of one rank's file: the items and the private tensors."""
    private = {f"{_RANK_STATE}{key}": tensor for key, tensor in rank_state.items()}
    return TensorFile({item.key: tensor for item, tensor in items} | private)


def write_rank(
    storage: Storage, name: Name, rank: int, world_size: int, stream: TensorFile, items: Sequence[WriteItem]
) -> int:
    """Write one rank's file (`stream` of `items`), then its vote. Returns the file's bytes. Raises StorageError."""
    file = file_of(rank)
    written = storage.put(f"{name.folder}/{file}", stream)
    facts, crc32 = stream.facts, stream.crc32
    if facts is None or facts.size != written:
        raise StorageError(f"{storage.name}/{name.folder}/{file}: {written} bytes written, expected {facts}")
    states = [key for key in crc32 if key.startswith(_RANK_STATE)]
    vote = Vote(
        name=str(name),
        rank=rank,
        world_size=world_size,
        facts=facts,
        pieces=tuple(_voted(file, item, crc32[item.key]) for item in items),
        rank_state={key.removeprefix(_RANK_STATE): StoredState(file=file, key=key, crc32=crc32[key]) for key in states},
    )
    storage.put(name.vote(rank), [dump_with_crc(vote)])
    return written


def _voted(file: str, item: WriteItem, crc32: tuple[int, ...]) -> VotedShard:
    return VotedShard(
        file=file,
        key=item.key,
        box=item.region.box,
        flat=item.region.flat_range,
        crc32=crc32,
        name=item.shard.name,
        role=item.shard.role,
        shape=item.shard.shape,
        dtype=item.shard.dtype,
    )


def refuse(storage: Storage, name: Name, rank: int, reason: str) -> None:
    """Write the reason why this rank will not vote, for rank 0. Ignores a StorageError."""
    with suppress(StorageError):
        storage.put(name.refusal(rank), [reason.encode()[:_REASON_BYTES]])


def await_votes(
    storage: Storage,
    name: Name,
    world_size: int,
    timeout_seconds: float,
    abandoned: threading.Event,
    poll_seconds: float = 0.01,
) -> None:
    """Block until all ranks have voted. Polls the storage after `poll_seconds`, then at increasing intervals.

    Raises StorageError when ranks refused (named), at the timeout (names those without a vote), or on `abandoned`.
    """
    deadline = time.monotonic() + timeout_seconds
    missing = list(range(world_size))
    while True:
        there = {entry.key for entry in storage.list(name.folder)}
        missing = [rank for rank in missing if name.vote(rank) not in there]
        if not missing:
            return
        _raise_refusals(storage, name, [rank for rank in missing if name.refusal(rank) in there])
        if abandoned.is_set():
            raise StorageError(f"checkpoint {name}: given up, because a rank could not write its part")
        if time.monotonic() >= deadline:
            raise StorageError(
                f"checkpoint {name}: no vote from rank {_joined(missing)} after {timeout_seconds:g} s; "
                f"nothing was committed. These ranks died, or do not write to {storage.name} as rank 0 sees it"
            )
        abandoned.wait(poll_seconds)
        poll_seconds = min(2 * poll_seconds, _LONGEST_POLL_SECONDS)


def _raise_refusals(storage: Storage, name: Name, refused: Sequence[int]) -> None:
    ranks: dict[str, list[int]] = {}
    for rank in refused:
        reason = storage.read(name.refusal(rank), _REASON_BYTES).decode(errors="replace")
        ranks.setdefault(reason, []).append(rank)
    if not ranks:
        return
    reasons = [
        f"rank {_joined(which)} could not write its part: {why}" for why, which in list(ranks.items())[:_REASONS]
    ]
    others = [rank for which in list(ranks.values())[_REASONS:] for rank in which]
    reasons += [f"nor could rank {_joined(others)}"] if others else []
    raise StorageError(f"checkpoint {name}: " + "; ".join(reasons))


def _joined(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def commit_votes(storage: Storage, name: Name, world_size: int, facts: Facts) -> Manifest:
    """Write manifest and commit, given all votes, and read them back.

    Raises CheckpointError if the pieces do not tile every tensor, StorageError if the storage fails or damage is read
    back. A read-back that the storage refuses is only logged, because the checkpoint is committed.
    """
    manifest = _manifest(storage, name, world_size, facts)
    data = dump_with_crc(manifest)
    storage.put(name.manifest, [data])
    document = Commit(
        format=FORMAT,
        name=str(name),
        step=name.step,
        kind=facts.kind,
        manifest=name.manifest,
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    if not storage.put_if_absent(name.commit, dump_with_crc(document)):
        raise StorageError(f"{storage.name}/{name.commit} exists already: do two runs share this folder?")
    try:
        inspect(storage, name)
    except DamagedError as error:
        raise StorageError(f"checkpoint {name} reads back other than it was written: {error}") from error
    except StorageError as error:
        logger.warning("checkpoint %s is written, but was not read back: %s", name, error)
    return manifest


def _manifest(storage: Storage, name: Name, world_size: int, facts: Facts) -> Manifest:
    files: dict[str, ManifestFile] = {}
    pieces: dict[str, dict[str, list[VotedShard]]] = {}
    private = []
    for rank in range(world_size):
        vote, data = _vote(storage, name, rank)
        if (vote.name, vote.rank, vote.world_size) != (str(name), rank, world_size):
            raise DamagedError(f"{storage.name}/{name.vote(rank)} is the vote of rank {vote.rank} on {vote.name}")
        sha256 = hashlib.sha256(data).hexdigest()
        files[file_of(rank)] = ManifestFile(**vote.facts.model_dump(), vote_size=len(data), vote_sha256=sha256)
        private.append(vote.rank_state)
        for piece in vote.pieces:
            pieces.setdefault(piece.role, {}).setdefault(piece.name, []).append(piece)
    return Manifest(
        format=FORMAT,
        name=str(name),
        step=name.step,
        kind=facts.kind,
        versions=versions(),
        layout=facts.layout,
        files=files,
        tensors={
            role: {tensor: _entry(role, tensor, held) for tensor, held in sorted(named.items())}
            for role, named in sorted(pieces.items())
        },
        rank_state=tuple(private),
        config=facts.config,
        state=facts.state,
    )


@read_twice
def _vote(storage: Storage, name: Name, rank: int) -> tuple[Vote, bytes]:
    data = read_bytes(storage, name.vote(rank))
    return load_with_crc(Vote, data, f"{storage.name}/{name.vote(rank)}"), data


def _entry(role: str, name: str, pieces: Sequence[VotedShard]) -> TensorEntry:
    shape, dtype = pieces[0].shape, pieces[0].dtype
    if any((piece.shape, piece.dtype) != (shape, dtype) for piece in pieces):
        raise CheckpointError(f"{role} of {name}: ranks disagree on its shape or dtype")
    problems = tiling_problems(shape, [(piece.file, piece.region) for piece in pieces])
    if problems:
        raise CheckpointError(f"{role} of {name} is not stored exactly once:\n  " + "\n  ".join(problems[:5]))
    fields = set(StoredShard.model_fields)
    return TensorEntry(
        dtype=dtype, shape=shape, pieces=tuple(StoredShard(**piece.model_dump(include=fields)) for piece in pieces)
    )
