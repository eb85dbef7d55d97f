"""Reads rows of tensors from a Hugging Face folder of safetensors. Never opens pickled weights (.bin, .pt)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from internlm_lite.apps.convert.recipes import Shape
from internlm_lite.checkpoint.format.tensor_file import StoredTensor, parse_header
from internlm_lite.errors import CheckpointError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")
_HEADER_LIMIT_BYTES = 100_000_000
_JSON_LIMIT_BYTES = 64 * 1024 * 1024
_IGNORED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")
"""Buffers saved by old versions of transformers: frequencies, causal masks; they are computed from the config."""


@dataclass(frozen=True)
class _TensorLocation:
    path: Path
    stored: StoredTensor


class HFFolder:
    """The tensors of a folder. Raises CheckpointError naming the file when something is missing or invalid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise CheckpointError(f"{path}: expected a folder with config.json and {ONE_FILE} or {INDEX}")
        self._locations: dict[str, _TensorLocation] = {}
        for file, names in self._files().items():
            header = read_header(path / file)
            missing = sorted(names - header.keys()) if names is not None else []
            if missing:
                raise CheckpointError(f"{path / file}: tensor {missing[0]} is missing, which {INDEX} says is there")
            for name, stored in header.items():
                if name in self._locations:
                    raise CheckpointError(f"{path / file}: tensor {name} is in {self._locations[name].path.name} too")
                self._locations[name] = _TensorLocation(path / file, stored)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Name -> shape, without buffers that are computed from the config."""
        return {name: place.stored.shape for name, place in self._locations.items() if not _IGNORED.fullmatch(name)}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: self._locations[name].stored.dtype for name in self.shapes}

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Change the names of the tensors; None: leave one out."""
        renamed = {new_name(name): place for name, place in self._locations.items()}
        self._locations = {name: place for name, place in renamed.items() if name is not None}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `stream.RowSource`."""
        place = self._locations[name]
        stored = place.stored
        row = torch.Size(stored.shape[1:]).numel() * stored.dtype.itemsize
        memory = torch.empty((stop - start) * row, dtype=torch.uint8)
        with _opened(place.path) as descriptor:
            read_exactly(place.path, descriptor, stored.start + start * row, memory.numpy().data)
        return memory.view(stored.dtype).view(stop - start, *stored.shape[1:])

    def _files(self) -> Mapping[str, set[str] | None]:
        """File -> its tensors according to the index; None without an index."""
        if (self.path / ONE_FILE).is_file():
            return {ONE_FILE: None}
        if not (self.path / INDEX).is_file():
            pickled = sorted(file.name for pattern in _PICKLES for file in self.path.glob(pattern))
            found = f"found {pickled[0]}, which is pickled: it could run code, so it is not read" if pickled else "none"
            raise CheckpointError(
                f"{self.path}: expected {ONE_FILE} or {INDEX}; {found}; "
                "save the model again with save_pretrained(..., safe_serialization=True)"
            )
        index = self.path / INDEX
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map: expected an object of tensor name -> file name")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not _PLAIN_NAME.fullmatch(file):
                raise CheckpointError(f"{index}: {name}: {file!r} is no name of a .safetensors file in this folder")
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        return files


def read_json(path: Path) -> dict[str, Any]:
    """Read a file with a JSON object. Raises CheckpointError."""
    try:
        if path.stat().st_size > _JSON_LIMIT_BYTES:
            raise CheckpointError(f"{path}: larger than {_JSON_LIMIT_BYTES} bytes, which no such file is")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; expected a file that save_pretrained writes") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return value


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The checked header of a safetensors file."""
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        length = bytearray(8)
        read_exactly(path, descriptor, 0, memoryview(length))
        header_bytes = 8 + int.from_bytes(length, "little")
        if not 8 < header_bytes <= min(size, _HEADER_LIMIT_BYTES):
            raise CheckpointError(f"{path}: is no safetensors file: a header of {header_bytes} bytes in one of {size}")
        raw = bytearray(header_bytes)
        read_exactly(path, descriptor, 0, memoryview(raw))
    try:
        return parse_header(bytes(raw), size)
    except ValueError as error:
        raise CheckpointError(f"{path}: header: {error}") from error


def read_exactly(path: Path, descriptor: int, start: int, buffer: memoryview) -> None:
    """Fill `buffer` with bytes of the file from `start` on. Raises CheckpointError naming `path`."""
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], start + done)
        if count == 0:
            raise CheckpointError(f"{path} ends at byte {start + done}, expected {start + len(buffer)}: copy it again")
        done += count


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; copy the folder again") from None
    try:
        yield descriptor
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    finally:
        os.close(descriptor)
