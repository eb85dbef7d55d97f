"""Writes a checkpoint as a folder that transformers reads, atomically."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.convert.families import Family
from internlm_lite.apps.convert.hf_config import to_hf
from internlm_lite.apps.convert.hf_folder import INDEX, ONE_FILE
from internlm_lite.apps.convert.recipes import TensorRecipe, hf_recipes
from internlm_lite.apps.convert.stream import ConvertedFile
from internlm_lite.apps.convert.tokenizers import files_of, generation_config, special_ids
from internlm_lite.checkpoint.format.catalog import Found
from internlm_lite.checkpoint.format.tensor_file import DTYPES
from internlm_lite.checkpoint.load.locate import locate, open_at
from internlm_lite.checkpoint.load.reader import Reader
from internlm_lite.checkpoint.storage.local import LocalStorage
from internlm_lite.checkpoint.storage.open import open_storage
from internlm_lite.config.schema import Config, S3Config
from internlm_lite.data.tokenizer import Tokenizer
from internlm_lite.errors import CheckpointError, StorageError
from internlm_lite.generate.prompts import GENERATION_CONFIG
from internlm_lite.mesh.layout import LocalShard
from internlm_lite.runtime.device import torch_dtype

SHARD_BYTES = 5_000_000_000
"""Largest size of a file of weights; a larger tensor gets a file of its own."""
_KEPT_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True)
class WriteResult:
    """The files written."""

    files: tuple[str, ...]
    """Files of weights."""
    n_tensors: int
    n_bytes: int


class MasterRows:
    """The fp32 masters of a checkpoint by rows; see `stream.RowSource`. Raises DamagedError with file and tensor."""

    def __init__(self, found: Found) -> None:
        self._reader = Reader(found)
        for file in found.manifest.files:
            self._reader.check_file(file)
        self._entries = found.manifest.tensors.get("master", {})
        sizes = [self._n_bytes(name) for name in self._entries]
        # One buffer for all tensors: freed buffers of many sizes would not be returned to the system.
        self._buffer = torch.empty(max((n for n in sizes if n <= _KEPT_BYTES), default=0), dtype=torch.uint8)
        self._kept: tuple[str, torch.Tensor] | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if self._kept is not None and self._kept[0] == name:
            return self._kept[1][start:stop]
        entry, size = self._entries[name], self._n_bytes(name)
        dtype = DTYPES[entry.dtype]
        if size > _KEPT_BYTES:
            return self._fill(name, torch.empty(stop - start, *entry.shape[1:], dtype=dtype), start)
        # Checksums cover blocks of megabytes, so a tensor of this size is read and checked once, as a whole.
        self._kept = None
        self._kept = (name, self._fill(name, self._buffer[:size].view(dtype).view(entry.shape), 0))
        return self._kept[1][start:stop]

    def _n_bytes(self, name: str) -> int:
        entry = self._entries[name]
        return prod(entry.shape) * DTYPES[entry.dtype].itemsize

    def _fill(self, name: str, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Fill `rows` with rows of the tensor from `start` on."""
        shape = self._entries[name].shape
        box = ((start, start + len(rows)), *((0, n) for n in shape[1:]))
        self._reader.fill(LocalShard(name, "master", shape, box, None, rows))
        return rows


def open_checkpoint(path: str, s3: S3Config | None = None) -> tuple[Found, Config, str]:
    """The checkpoint at `path` (a save folder, or one checkpoint in it), its config, and its own path.

    Raises CheckpointError.
    """
    root, name = locate(path, s3)
    found = open_at(open_storage(root, s3), name)
    alone = f"{root.rstrip('/')}/{found.folder}" if found.folder else path
    return found, found.config_of_stage(), alone


def write_hf(
    found: Found,
    config: Config,
    out: Path,
    *,
    family: Family,
    dtype: str,
    tokenizer: Tokenizer | None,
    shard_bytes: int = SHARD_BYTES,
    done: Callable[[str], object] = lambda name: None,
) -> WriteResult:
    """Write the folder `out`, which must be missing or empty. `dtype`: such as "bfloat16".

    Raises CheckpointError when `family` cannot express the model, or the checkpoint is damaged; StorageError.
    """
    hf_config = to_hf(config.model, family, config.data.seq_len, dtype)
    recipes = hf_recipes(config.model, family)
    source = MasterRows(found)
    compare_names(found.manifest_path, source.shapes, {rows.name for recipe in recipes for rows in recipe.rows})
    shards = split_shards(recipes, torch_dtype(dtype).itemsize, shard_bytes)
    documents: dict[str, Any] = {"config.json": hf_config}
    if tokenizer is not None:
        hf_config |= special_ids(tokenizer)
        documents[GENERATION_CONFIG] = generation_config(tokenizer)
    with new_folder(out) as storage:
        n_bytes = 0
        for file, part in shards.items():
            stream = ConvertedFile({recipe.name: recipe for recipe in part}, torch_dtype(dtype), source, done)
            n_bytes += storage.put(file, stream)
        if len(shards) > 1:
            documents[INDEX] = _index(shards, torch_dtype(dtype).itemsize)
        for file, value in documents.items():
            storage.put(file, [json.dumps(value, indent=2).encode() + b"\n"])
        if tokenizer is not None:
            for file, content in files_of(tokenizer, config.data.seq_len).items():
                storage.put(file, [content])
    return WriteResult(tuple(shards), len(recipes), n_bytes)


@contextmanager
def new_folder(out: Path) -> Iterator[LocalStorage]:
    """Writes the folder `out`, which must be missing or empty, completely or not at all. Raises CheckpointError,
    StorageError."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out} exists: choose a folder that does not exist, or is empty")
    if out.resolve() == Path.cwd():  # renaming would replace the working directory of the shell
        raise CheckpointError(f"{out}: this is the folder you are in; give the name of one to make")
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield LocalStorage(partial)
        os.rename(partial, out)
    except OSError as error:
        raise StorageError(f"cannot write {out}: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def split_shards(recipes: Sequence[TensorRecipe], itemsize: int, shard_bytes: int) -> dict[str, list[TensorRecipe]]:
    """File name -> its tensors, in their order, no file larger than `shard_bytes` unless one tensor is."""
    parts: list[list[TensorRecipe]] = []
    room = 0
    for recipe in recipes:
        size = recipe.numel * itemsize
        if not parts or size > room:
            parts.append([])
            room = shard_bytes
        parts[-1].append(recipe)
        room -= size
    if len(parts) == 1:
        return {ONE_FILE: parts[0]}
    return {f"model-{n:05d}-of-{len(parts):05d}.safetensors": part for n, part in enumerate(parts, 1)}


def compare_names(where: str, have: dict[str, tuple[int, ...]], wanted: set[str]) -> None:
    """Raises CheckpointError naming the tensors that are missing or unknown."""
    lines = [f"missing: {name}" for name in sorted(wanted - have.keys())]
    lines += [f"unknown: {name} {list(have[name])}" for name in sorted(have.keys() - wanted)]
    if lines:
        more = [f"... and {len(lines) - 12} more"] if len(lines) > 12 else []
        raise CheckpointError(
            f"{where}: the tensors are not those of the model its config describes:\n  "
            + "\n  ".join(lines[:12] + more)
        )


def _index(shards: dict[str, list[TensorRecipe]], itemsize: int) -> dict[str, Any]:
    numel = sum(recipe.numel for part in shards.values() for recipe in part)
    return {
        "metadata": {"total_parameters": numel, "total_size": numel * itemsize},
        "weight_map": {recipe.name: file for file, part in shards.items() for recipe in part},
    }
