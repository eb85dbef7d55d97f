"""Writes a checkpoint of weights alone by one process, outside a run: converted or merged ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import prod

from internlm_lite.checkpoint.format import catalog
from internlm_lite.checkpoint.format.manifest import Name
from internlm_lite.checkpoint.format.shards import ShardDescriptor
from internlm_lite.checkpoint.format.tensor_file import TensorFile
from internlm_lite.checkpoint.format.weight_roles import MASTER
from internlm_lite.checkpoint.save import commit
from internlm_lite.checkpoint.save.write_plan import WriteItem, plan_writes
from internlm_lite.checkpoint.storage.base import Storage
from internlm_lite.errors import CheckpointError, InternLMError


def require_empty(storage: Storage) -> None:
    """Raises CheckpointError if the save folder has a checkpoint."""
    if catalog.committed(storage):
        raise CheckpointError(f"{storage.name} holds checkpoints already: choose a folder without any")


def whole_master(name: str, shape: tuple[int, ...], dtype: str) -> ShardDescriptor:
    """Descriptor of a whole tensor; `dtype` as `tensor_file.DTYPES` calls it."""
    box = tuple((0, n) for n in shape)
    return ShardDescriptor(MASTER, name, shape, box, (0, prod(shape)), dtype)


def write_alone(
    storage: Storage,
    step: int,
    tensors: Sequence[ShardDescriptor],
    stream_of: Callable[[Sequence[WriteItem]], TensorFile],
    facts: commit.Facts,
) -> tuple[Name, int]:
    """(name of the checkpoint, its bytes). `stream_of`: makes the file of the items. Removes a partial checkpoint after
    a failure; one that a killed process leaves does not exist for any reader, and is swept by the next run."""
    name = Name(1, step, uuid.uuid4().hex[:6])
    items = plan_writes([list(tensors)])[0]
    try:
        n_bytes = commit.write_rank(storage, name, 0, 1, stream_of(items), items)
        commit.commit_votes(storage, name, 1, facts)
    except BaseException:
        with suppress(InternLMError):
            catalog.remove(storage, name)
        raise
    return name, n_bytes
