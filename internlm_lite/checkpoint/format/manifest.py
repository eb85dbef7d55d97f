"""The JSON documents of a checkpoint. Each starts with the crc32 of the exact bytes of its body.

{"crc32":"89abcdef","body":{...}}

vote      rank r has written its file: sizes, checksums, its shards
manifest  index of all tensors, config, state: makes the data folder self-contained
commit    the checkpoint exists; contains the manifest's sha256
"""

from __future__ import annotations

import json
import platform
import re
import zlib
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError

from internlm_lite.checkpoint.format.regions import Region
from internlm_lite.checkpoint.format.tensor_file import DTYPES, FileFacts, JsonDocument
from internlm_lite.checkpoint.storage.base import Storage, UnreadableError
from internlm_lite.errors import CheckpointError, DamagedError
from internlm_lite.mesh.layout import Box
from internlm_lite.mesh.mesh import Mesh

FORMAT = 1
Kind = Literal["snapshot", "milestone", "final", "rescue", "best"]
_NAME = r"([0-9]{10,15})-([0-9]{5,9})\.([0-9a-f]{6})"
NameText = Annotated[str, Field(pattern=f"^{_NAME}$")]
FileName = Annotated[str, Field(pattern=r"^rank-[0-9]{5,9}\.safetensors$")]
DtypeName = Annotated[str, Field(pattern="^(" + "|".join(DTYPES) + ")$")]
_DOCUMENT_LIMIT_BYTES = 1 << 30
_CRC = re.compile(rb'\{"crc32":"([0-9a-f]{8})","body":')


class StoredShard(JsonDocument):
    """A shard of a whole tensor, stored as tensor `key` of `file`."""

    file: FileName
    key: str
    box: Box
    flat: tuple[int, int] | None
    crc32: tuple[int, ...]
    """One per BLOCK_BYTES of the tensor; the last block may be shorter."""

    @property
    def region(self) -> Region:
        return Region(self.box, self.flat)


class VotedShard(StoredShard):
    """A shard with the facts about its whole tensor."""

    name: str
    role: str
    shape: tuple[int, ...]
    dtype: DtypeName


class StoredState(JsonDocument):
    """A small uint8 tensor of one rank, such as the state of a random generator."""

    file: FileName
    key: str
    crc32: tuple[int, ...]


class Vote(JsonDocument):
    """States that rank `rank` of `world_size` has written its part of checkpoint `name`."""

    name: NameText
    rank: int
    world_size: int
    facts: FileFacts
    pieces: tuple[VotedShard, ...]
    rank_state: dict[str, StoredState]


class TensorEntry(JsonDocument):
    """One role of one named whole tensor, and the shards that tile it."""

    dtype: DtypeName
    shape: tuple[int, ...]
    pieces: tuple[StoredShard, ...]


class ManifestFile(FileFacts):
    """Facts about a rank's file and its vote."""

    vote_size: int
    vote_sha256: str


class Manifest(JsonDocument):
    """Everything about a checkpoint except the tensors' bytes."""

    format: int
    name: NameText
    step: int
    kind: Kind
    versions: dict[str, str]
    layout: dict[str, int]
    files: dict[FileName, ManifestFile]
    """File name -> facts, in rank order."""
    tensors: dict[str, dict[str, TensorEntry]]
    """role -> name -> entry."""
    rank_state: tuple[dict[str, StoredState], ...]
    """One per rank, in rank order."""
    config: dict[str, Any]
    state: dict[str, Any]


class Commit(JsonDocument):
    """Makes the checkpoint exist; written last."""

    format: int
    name: NameText
    step: int
    kind: Kind
    manifest: str
    """Key of the manifest."""
    size: int
    sha256: str


@dataclass(frozen=True, order=True)
class Name:
    """`<step 010d>-<serial 05d>.<6 hex digits>`. Names are ordered by serial number.

    The serial number increases with every save to a folder, so the newest checkpoint has the largest name, also after a
    rollback to an earlier step. The random digits distinguish writers: those of a run come from its lease.
    """

    serial: int
    step: int
    random: str

    @classmethod
    def parse(cls, text: str) -> Name | None:
        found = re.fullmatch(_NAME, text)
        return cls(int(found[2]), int(found[1]), found[3]) if found else None

    def __str__(self) -> str:
        return f"{self.step:010d}-{self.serial:05d}.{self.random}"

    @property
    def folder(self) -> str:
        return f"data/{self}"

    @property
    def manifest(self) -> str:
        return f"data/{self}/manifest.json"

    @property
    def commit(self) -> str:
        return f"commits/{self}.json"

    def vote(self, rank: int) -> str:
        return f"data/{self}/{vote_of(file_of(rank))}"

    def refusal(self, rank: int) -> str:
        return f"data/{self}/rank-{rank:05d}.refused.txt"


def file_of(rank: int) -> str:
    """File name of a rank's tensors in the data folder."""
    return f"rank-{rank:05d}.safetensors"


def vote_of(file: str) -> str:
    """File name of the vote on a rank's tensor file, in the same folder."""
    return f"{file.removesuffix('.safetensors')}.vote.json"


def dump_with_crc(document: JsonDocument) -> bytes:
    """The document as JSON with its checksum."""
    body = document.model_dump_json().encode()
    return b'{"crc32":"%08x","body":%s}\n' % (zlib.crc32(body), body)


JsonDocumentT = TypeVar("JsonDocumentT", bound=JsonDocument)


def load_with_crc(kind: type[JsonDocumentT], data: bytes, where: str) -> JsonDocumentT:
    """The document in `data`. Raises DamagedError naming `where` if the crc32 or a field is wrong."""
    front = _CRC.match(data)
    body = data[front.end() : -2] if front else b""
    if not front or data[-2:] != b"}\n" or zlib.crc32(body) != int(front[1], 16):
        raise DamagedError(f"{where}: damaged: {len(data)} bytes that do not match their crc32")
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise DamagedError(f"{where}: is no {kind.__name__.lower()}: {field}: {first['msg']}") from error


def read_bytes(storage: Storage, key: str) -> bytes:
    """A whole document. Raises DamagedError if it is absent or unreadable."""
    try:
        return storage.read(key, _DOCUMENT_LIMIT_BYTES)
    except UnreadableError as error:
        raise DamagedError(str(error)) from error


def versions() -> dict[str, str]:
    """Versions of the format, torch and Python that write a checkpoint."""
    return {"format": str(FORMAT), "torch": str(torch.__version__), "python": platform.python_version()}


def layout_of(mesh: Mesh) -> dict[str, int]:
    """Axis -> number of ranks, with "world"."""
    return {"world": mesh.world.size, **asdict(mesh.sizes)}


def check_json(value: Any, where: str = "state") -> None:
    """Raises CheckpointError naming the first part of `value` that a JSON round trip would change or reject."""
    if isinstance(value, dict):
        for key, part in value.items():
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: key {key!r} is no str: JSON would change it; use str(key)")
            check_json(part, f"{where}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            check_json(part, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where}: {type(value).__name__} is not stored as JSON; use str, int, float, bool, list, dict"
        )
    else:
        try:
            json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise CheckpointError(f"{where}: {value!r} is not stored as JSON: {error}") from error
