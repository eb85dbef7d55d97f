"""S3 behind the storage protocol, on a real server: whole objects or none, names, conditions, parts, cleaning up."""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from internlm_lite.checkpoint.storage import s3_multipart as s3parts
from internlm_lite.checkpoint.storage.base import UnreadableError
from internlm_lite.checkpoint.storage.s3 import S3Storage
from internlm_lite.checkpoint.storage.s3_multipart import cut
from internlm_lite.config.paths import parse_s3
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import StorageError
from tests.s3server import BUCKET, S3Server

PART = 5 * 1024 * 1024  # the smallest that S3 allows
INSECURE = S3Config(insecure=True)


def open_s3(where: str, settings: S3Config = INSECURE) -> S3Storage:
    path = parse_s3(where)
    assert path is not None
    return S3Storage(path, settings, part_bytes=PART)


@pytest.fixture
def storage(s3_folder: str) -> S3Storage:
    return open_s3(s3_folder)


def _unfinished(server: S3Server, storage: S3Storage) -> list[str]:
    prefix = storage.name.rpartition("/")[2]
    found = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [upload["Key"] for upload in found]


def test_put_read_list_delete(storage: S3Storage) -> None:
    assert storage.list("") == [] and storage.size("a/b") is None
    assert storage.put("a/b", [b"12", memoryview(b"345"), b""]) == 5
    storage.put("c", [])
    storage.put("ab", [b"x"])
    assert storage.read("a/b", 5) == b"12345" and storage.size("c") == 0 and storage.read("c", 0) == b""
    buffer = bytearray(3)
    storage.read_into("a/b", 1, memoryview(buffer))
    assert bytes(buffer) == b"234"
    assert [(entry.key, entry.size) for entry in storage.list("")] == [("a/b", 5), ("ab", 1), ("c", 0)]
    assert [entry.key for entry in storage.list("a")] == ["a/b"]
    storage.delete("c")
    storage.delete("c")
    storage.delete_folder("a")
    storage.delete_folder("a")
    assert [entry.key for entry in storage.list("")] == ["ab"]


@pytest.mark.parametrize("settings", [{"checksums": "crc32"}, {"checksums": "none"}, {"addressing": "path"}])
def test_other_settings(s3_folder: str, settings: dict[str, Any]) -> None:
    storage = open_s3(s3_folder, S3Config(insecure=True, **settings))
    data = os.urandom(PART + 1)
    assert storage.put("small", [b"1"]) == 1 and storage.put("big", [data]) == len(data)
    assert storage.read("big", len(data)) == data
    assert storage.put_if_absent("x", b"1") and not storage.put_if_absent("x", b"2")
    storage.delete_folder("x")


@pytest.mark.parametrize("size", [PART - 1, PART, PART + 1, 3 * PART, 23 * 1024 * 1024 + 7])
def test_parts_come_back_as_one_object(s3_server: S3Server, storage: S3Storage, size: int) -> None:
    data = random.Random(size).randbytes(size)
    chunks = [memoryview(data)[start : start + 1_234_567] for start in range(0, size, 1_234_567)]
    assert storage.put("data/x", chunks) == size == storage.size("data/x")
    tag = s3_server.client().head_object(Bucket=BUCKET, Key=f"{storage.name.rpartition('/')[2]}/data/x")["ETag"]
    assert tag.strip('"').partition("-")[2] == ("" if size <= PART else str(-(-size // PART)))
    buffer = bytearray(size - 20)
    storage.read_into("data/x", 13, memoryview(buffer))
    assert buffer == data[13:-7]
    assert _unfinished(s3_server, storage) == []


def test_cut_gives_full_parts_and_copies() -> None:
    reused = bytearray(b"abc")

    def chunks() -> Iterator[bytearray]:
        for letter in b"xyz":
            reused[:] = bytes([letter]) * 3
            yield reused

    assert [bytes(part) for part in cut(chunks(), 4)] == [b"xxxy", b"yyzz", b"z"]
    assert list(cut([], 4)) == [] and [bytes(part) for part in cut([b"abcd", b""], 4)] == [b"abcd"]


def test_memory_is_bounded_by_the_parts_in_flight(storage: S3Storage) -> None:
    block = bytes(1024 * 1024)
    tracemalloc.start()
    try:
        storage.put("data/x", (block for _ in range(100)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (s3parts.PARALLEL + 3) * 1.3 * PART, f"{peak} bytes for an object of 100 MiB"


@pytest.mark.parametrize("bad", ["", "/etc/x", "../x", "a/../x", ".hidden", "a b", "é", "a\n"])
def test_bad_keys_are_refused(storage: S3Storage, bad: str) -> None:
    for attempt in (lambda: storage.put(bad, [b"1"]), lambda: storage.read(bad, 9), lambda: storage.delete_folder(bad)):
        with pytest.raises(StorageError, match="no name for a stored object"):
            attempt()


def test_absent_and_short_objects_are_the_objects_fault(storage: S3Storage) -> None:
    storage.put("x", [b"12345"])
    with pytest.raises(UnreadableError, match=r"nothing: .*does not exist"):
        storage.read("nothing", 10)
    with pytest.raises(UnreadableError, match=r"nothing: .*does not exist"):
        storage.read_into("nothing", 0, memoryview(bytearray(1)))
    with pytest.raises(UnreadableError, match="5 bytes, expected at most 4"):
        storage.read("x", 4)
    with pytest.raises(UnreadableError, match="ends at byte 5, expected 6"):
        storage.read_into("x", 2, memoryview(bytearray(4)))
    with pytest.raises(UnreadableError, match="InvalidRange"):
        storage.read_into("x", 9, memoryview(bytearray(1)))


def test_put_if_absent_has_one_winner(s3_folder: str) -> None:
    storages = [open_s3(s3_folder) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        won = list(pool.map(lambda n: storages[n].put_if_absent("commits/x", b"%d" % n), range(4)))
    assert sum(won) == 1 and storages[0].read("commits/x", 9) == b"%d" % won.index(True)
    assert [entry.key for entry in storages[0].list("")] == ["commits/x"], "the probe is gone"


def test_put_if_absent_on_a_server_that_ignores_conditions(storage: S3Storage) -> None:
    def forget(params: dict[str, Any], **_: object) -> None:
        params["headers"].pop("If-None-Match", None)

    storage._client.meta.events.register("before-call.s3.PutObject", forget)
    assert storage.put_if_absent("x", b"1") and not storage.put_if_absent("x", b"2")
    assert storage.read("x", 1) == b"1" and storage._has_conditions is False


def test_many_objects_are_listed_and_deleted_page_by_page(storage: S3Storage) -> None:
    keys = [f"many/{n:04d}" for n in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: storage.put(key, [b"1"]), keys))
    assert [entry.key for entry in storage.list("many")] == keys
    storage.put("manyfold", [b"1"])
    storage.delete_folder("many")
    assert [entry.key for entry in storage.list("")] == ["manyfold"]


def test_sweep_aborts_old_unfinished_uploads_of_this_folder_alone(s3_server: S3Server, s3_folder: str) -> None:
    mine, other = open_s3(f"{s3_folder}/run"), open_s3(f"{s3_folder}/run2")
    client = s3_server.client()
    for storage in (mine, other):
        prefix = storage.name.partition("/")[2].lstrip("/").partition("/")[2]
        client.create_multipart_upload(Bucket=BUCKET, Key=f"{prefix}/data/x/rank-00000.safetensors")
    mine.sweep(3600)
    assert len(_uploads_below(s3_server, s3_folder)) == 2, "its writer may be alive"
    mine.sweep(-60)
    (left,) = _uploads_below(s3_server, s3_folder)
    assert "/run2/" in left
    other.delete_folder("data/x")
    assert _uploads_below(s3_server, s3_folder) == []


def _uploads_below(server: S3Server, folder: str) -> list[str]:
    prefix = folder.rpartition("/")[2]
    found = server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [upload["Key"] for upload in found]


def test_a_failing_source_leaves_nothing(s3_server: S3Server, storage: S3Storage) -> None:
    def chunks() -> Iterator[bytes]:
        yield bytes(3 * PART)
        raise RuntimeError("the tensor is gone")

    with pytest.raises(RuntimeError, match="the tensor is gone"):
        storage.put("data/x", chunks())
    assert storage.size("data/x") is None and _unfinished(s3_server, storage) == []


def test_too_many_parts_are_refused(storage: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3parts, "MOST_PARTS", 2)
    with pytest.raises(StorageError, match="more than 2 parts"):
        storage.put("data/x", [bytes(3 * PART)])
