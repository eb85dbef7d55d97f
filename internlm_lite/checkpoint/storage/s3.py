"""Storage in a folder of an S3 bucket. An object becomes visible when its upload is complete. Writers that die leave
only parts of unfinished uploads, which are not visible as objects; `sweep` removes them.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any
from urllib.parse import urlsplit

from botocore.exceptions import ClientError, PaginationError

from internlm_lite.checkpoint.storage.base import Bytes, ForeignObjectError, StoredObject, UnreadableError, check_key
from internlm_lite.checkpoint.storage.s3_client import connect
from internlm_lite.checkpoint.storage.s3_multipart import PARALLEL, PART_BYTES, MultipartUpload, content, cut
from internlm_lite.checkpoint.storage.s3_retry import Calls, RefusedError
from internlm_lite.config.paths import S3Path
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")

_READ_BYTES = 16 * 1024 * 1024
"""Longer ranges are read by several concurrent requests."""
_STEP_BYTES = 256 * 1024
_BATCH = 1000
"""Maximum number of objects per delete request."""
_PATIENCE_PAGES, _MOST_OBJECTS = 100, 2_000_000
"""A listing with more pages in a row that bring nothing new, or with more objects, has no end."""
_NOT_MET = ("PreconditionFailed", "412")
_NOT_KNOWN = ("NotImplemented", "501", "MethodNotAllowed", "405", "InvalidArgument", "InvalidRequest", "400")


class S3Storage:
    """`Storage` of objects below a folder of a bucket. Thread-safe."""

    def __init__(self, path: S3Path, settings: S3Config, part_bytes: int = PART_BYTES) -> None:
        self.name = str(path)
        self._bucket, self._prefix = path.bucket, f"{path.prefix}/"
        self._client, secrets = connect(path, settings)
        below = urlsplit(self._client.meta.endpoint_url).path.strip("/")
        hint = (
            f"; the endpoint has a path, /{below}: is S3 served there? Expected is http(s)://HOST[:PORT]"
            if below
            else ""
        )
        self._calls = Calls(self.name, settings.deadline_seconds, secrets, hint)
        self._with_md5 = settings.checksums == "md5"
        self._part_bytes = part_bytes
        self._heeds: dict[str, bool] = {}
        """IfNoneMatch or IfMatch -> whether the server enforces this condition of a put; tested once."""

    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        names = self._names(key)
        parts = cut(chunks, self._part_bytes)
        first, second = next(parts, bytearray()), next(parts, None)
        if second is None:
            self._put(key, first)
            return len(first)
        upload = MultipartUpload(self._client, self._calls, key, names)
        return upload.write(chain([first, second], parts), with_md5=self._with_md5)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        if not self._is_heeded("IfNoneMatch") and self.size(key) is not None:
            return False
        return self._put_if(key, data, "IfNoneMatch", "*")

    def replace(self, key: str, old: bytes, new: bytes) -> bool:
        with suppress(UnreadableError):
            tag, found = self._get(key, len(old))
            return found == old and self._put_if(key, new, "IfMatch", tag)
        return False

    def _put(self, key: str, data: bytes | bytearray, **conditions: str) -> None:
        body = content(data, self._calls, with_md5=self._with_md5)
        request = partial(self._client.put_object, **self._names(key), **body, **conditions)
        self._calls.run("write", key, request, body=body["Body"])

    def _put_if(self, key: str, data: bytes, condition: str, value: str) -> bool:
        """Write the object if the condition holds; unconditionally if the server does not support conditions."""
        try:
            self._put(key, data, **({condition: value} if self._is_heeded(condition) else {}))
        except RefusedError as error:
            if error.code not in _NOT_MET:
                raise
            # A first attempt may have succeeded although its answer was lost; then the second one is refused.
            return self.size(key) == len(data) and self.read(key, len(data)) == data
        return True

    def _is_heeded(self, condition: str) -> bool:
        if condition not in self._heeds:
            self._heeds[condition] = self._try_condition(condition, {"IfNoneMatch": "*"}.get(condition, '"other"'))
        return self._heeds[condition]

    def _try_condition(self, condition: str, value: str) -> bool:
        folder = f"probe-{uuid.uuid4().hex}"
        try:
            self._put(f"{folder}/condition", b"first")
            self._put(f"{folder}/condition", b"second", **{condition: value})
        except RefusedError as error:
            if error.code in _NOT_MET:
                return True
            if error.code not in _NOT_KNOWN:
                raise
        finally:
            with suppress(StorageError):
                self.delete_folder(folder)
        logger.info("%s: the server knows no %s: objects are looked up before they are written", self.name, condition)
        return False

    def read(self, key: str, limit_bytes: int) -> bytes:
        return self._get(key, limit_bytes)[1]

    def _get(self, key: str, limit_bytes: int) -> tuple[str, bytes]:
        """(ETag of the object, its bytes)"""
        names, deadline = self._names(key), self._calls.deadline()

        def request() -> tuple[str, bytes]:
            answer = self._client.get_object(**names)
            with answer["Body"] as stream:
                size = answer["ContentLength"]
                if size > limit_bytes:
                    raise ForeignObjectError(f"{self.name}/{key}: {size} bytes, expected at most {limit_bytes}")
                data = bytearray(size)
                for _ in _steps(stream, memoryview(data), deadline):
                    pass
                return str(answer["ETag"]), bytes(data)

        return self._calls.run("read", key, request)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self._names(key)
        buffer = buffer.cast("B")
        ranges = [(at, buffer[at : at + _READ_BYTES]) for at in range(0, len(buffer), _READ_BYTES)]
        if len(ranges) == 1:
            self._read_range(key, start, buffer)
        if len(ranges) <= 1:
            return
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3-read") as pool:
            futures = [pool.submit(self._read_range, key, start + at, part) for at, part in ranges]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _read_range(self, key: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from byte `start` on; after a broken connection, continues at the first missing byte."""
        names, stop, done, deadline = self._names(key), start + len(buffer), 0, self._calls.deadline()

        def request() -> None:
            nonlocal done
            answer = self._client.get_object(**names, Range=f"bytes={start + done}-{stop - 1}")
            with answer["Body"] as stream:
                self._check_range(key, answer, start + done, stop)
                for count in _steps(stream, buffer[done:], deadline):
                    done += count

        self._calls.run("read", key, request)

    def _check_range(self, key: str, answer: Any, start: int, stop: int) -> None:
        """Raises StorageError unless the answer holds bytes start..stop-1 of the object."""
        said = answer.get("ContentRange", f"bytes 0-{answer['ContentLength'] - 1}/{answer['ContentLength']}")
        span, _, size = said.removeprefix("bytes ").partition("/")
        if size.isdecimal() and int(size) < stop:
            raise UnreadableError(f"{self.name}/{key} ends at byte {size}, expected {stop}")
        if span != f"{start}-{stop - 1}" and not (start == 0 and "ContentRange" not in answer):
            raise StorageError(f"cannot read {self.name}/{key}: asked for bytes {start}-{stop - 1}, got {said}")

    def size(self, key: str) -> int | None:
        with suppress(UnreadableError):
            names = self._names(key)
            return self._calls.run("look up", key, lambda: int(self._client.head_object(**names)["ContentLength"]))
        return None

    def list(self, folder: str) -> list[StoredObject]:
        entries = []
        for item in self._pages("list_objects_v2", "Contents", self._below(folder)):
            key = item["Key"].removeprefix(self._prefix)
            with suppress(StorageError):  # invalid keys
                check_key(key)
                entries.append(StoredObject(key, item["Size"], item["LastModified"].timestamp()))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        with suppress(UnreadableError):
            self._calls.run("delete", key, partial(self._client.delete_object, **self._names(key)))

    def delete_folder(self, folder: str) -> None:
        check_key(folder)
        below = self._below(folder)
        object_keys = [item["Key"] for item in self._pages("list_objects_v2", "Contents", below)]
        for begin in range(0, len(object_keys), _BATCH):
            self._calls.run("delete", folder, partial(self._delete_batch, object_keys[begin : begin + _BATCH]))
        self._abort_uploads(below, time.time() + 365 * 86_400)

    def sweep(self, older_than_seconds: float, ending: str = "") -> None:
        self._abort_uploads(self._prefix, time.time() - older_than_seconds, f"data/*{ending}/*" if ending else "*")

    def _delete_batch(self, object_keys: Sequence[str]) -> None:
        """Ignores objects that do not exist, so that the request may be repeated."""
        wanted = {"Objects": [{"Key": object_key} for object_key in object_keys], "Quiet": True}
        errors = self._client.delete_objects(Bucket=self._bucket, Delete=wanted).get("Errors", [])
        for error in errors:
            if error.get("Code") != "NoSuchKey":
                raise ClientError({"Error": error}, "DeleteObjects")

    def _abort_uploads(self, below: str, before: float, pattern: str = "*") -> None:
        """Abort uploads whose object's name starts with `below` and whose key matches `pattern`, begun before `before`
        (seconds since the epoch)."""
        try:
            found = self._pages("list_multipart_uploads", "Uploads", below)
        except RefusedError as error:
            if error.code not in _NOT_KNOWN:
                raise
            logger.debug("%s: unfinished uploads stay: %s", self.name, error)
            return
        for upload in found:
            key = upload["Key"].removeprefix(self._prefix)
            if upload["Initiated"].timestamp() < before and fnmatchcase(key, pattern):
                names = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                abort = partial(self._client.abort_multipart_upload, **names)
                try:
                    self._calls.run("abort the upload of", key, abort)
                except (UnreadableError, RefusedError) as error:
                    if isinstance(error, RefusedError) and error.code != "NoSuchUpload":
                        raise

    def _pages(self, what: str, field: str, below: str) -> Sequence[Any]:
        """All pages of a listing of objects or uploads whose name starts with `below`. Raises RefusedError if there is
        no end of it."""
        pages = self._client.get_paginator(what).paginate(Bucket=self._bucket, Prefix=below)
        key = below.removeprefix(self._prefix).rstrip("/")
        found: dict[tuple[str, str], Any] = {}

        def request() -> None:
            pages_without_news = 0
            for page in pages:
                before = len(found)
                # Filtered again: with a server that ignores Prefix we would delete or abort what belongs to others.
                items = (item for item in page.get(field, []) if item["Key"].startswith(below))
                found.update({(item["Key"], item.get("UploadId", "")): item for item in items})
                pages_without_news = 0 if len(found) > before else pages_without_news + 1
                if pages_without_news > _PATIENCE_PAGES or len(found) > _MOST_OBJECTS:
                    raise PaginationError(message="no end")

        self._calls.run("list", key, request)
        return list(found.values())

    def _names(self, key: str) -> dict[str, str]:
        """The arguments Bucket and Key of a request. Raises StorageError for an invalid key."""
        check_key(key)
        return {"Bucket": self._bucket, "Key": self._prefix + key}

    def _below(self, folder: str) -> str:
        return f"{self._names(folder)['Key']}/" if folder else self._prefix


def _steps(stream: Any, buffer: memoryview, deadline: float) -> Iterator[int]:
    """Fill the buffer; yields the size of each step. Raises OSError if the answer ends early or at the deadline."""
    # read1 returns what has arrived, so the deadline is checked often; an old urllib3 has only `read`, which blocks.
    read = getattr(stream, "read1", stream.read)
    done = 0
    while done < len(buffer):
        if time.monotonic() > deadline:
            raise TimeoutError("too slow")
        block = read(min(_STEP_BYTES, len(buffer) - done))
        if not block:
            raise ConnectionError("the answer ended early")
        buffer[done : done + len(block)] = block
        yield len(block)
        done += len(block)
