"""Storage in a folder of an S3 bucket. An object appears when its upload is complete, whole; until then, or if the
writer dies, there is none. What dead writers leave are parts of unfinished uploads: invisible, and removed by `sweep`.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any

from botocore.exceptions import ClientError

from internlm_lite.checkpoint.storage.base import Bytes, Entry, UnreadableError, check_key
from internlm_lite.checkpoint.storage.s3_client import connect
from internlm_lite.checkpoint.storage.s3_multipart import PARALLEL, PART_BYTES, Target, cut
from internlm_lite.checkpoint.storage.s3_retry import Calls, RefusedError
from internlm_lite.config.paths import S3Path
from internlm_lite.config.schema import S3Config
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")

_READ_BYTES = 16 * 1024 * 1024
"""A longer range is read by several requests at a time."""
_STEP_BYTES = 256 * 1024
_BATCH = 1000
"""Objects that one request may delete."""
_NO_CONDITIONS = ("NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400")


class S3Storage:
    """Objects below a folder of a bucket. Safe to use from several threads."""

    def __init__(self, path: S3Path, settings: S3Config, part_bytes: int = PART_BYTES) -> None:
        self.name = str(path)
        self._bucket, self._prefix = path.bucket, f"{path.prefix}/"
        connection = connect(path, settings)
        self._client = connection.client
        self._calls = Calls(self.name, settings.deadline_seconds, connection.secrets)
        self._with_md5 = settings.checksums == "md5"
        self._part_bytes = part_bytes
        self._has_conditions: bool | None = None

    def put(self, key: str, chunks: Iterable[Bytes]) -> int:
        target = self._target(key)
        parts = cut(chunks, self._part_bytes)
        first, second = next(parts, bytearray()), next(parts, None)
        if second is not None:
            return target.put_parts(chain([first, second], parts))
        target.put(first)
        return len(first)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        target = self._target(key)
        if self._has_conditions is None:
            self._has_conditions = self._try_conditions()
        if not self._has_conditions:
            if self.size(key) is not None:
                return False
            target.put(data)
            return True
        try:
            target.put(data, IfNoneMatch="*")
        except RefusedError as error:
            if error.code not in ("PreconditionFailed", "412"):
                raise
            # It may be an answer to our own second attempt, when that to the first got lost.
            return self.read(key, limit_bytes=len(data)) == data if self.size(key) == len(data) else False
        return True

    def _try_conditions(self) -> bool:
        """Whether the server heeds If-None-Match on a put."""
        folder = f"probe-{uuid.uuid4().hex}"
        target = self._target(f"{folder}/condition")
        target.put(b"first")
        try:
            target.put(b"second", IfNoneMatch="*")
        except RefusedError as error:
            if error.code in ("PreconditionFailed", "412"):
                return True
            if error.code not in _NO_CONDITIONS:
                raise
        finally:
            with suppress(StorageError):
                self.delete_folder(folder)
        logger.info("%s: the server knows no If-None-Match: commits are looked up before they are written", self.name)
        return False

    def read(self, key: str, limit_bytes: int) -> bytes:
        place = self._place(key)

        def request(deadline: float) -> bytes:
            answer = self._client.get_object(Bucket=self._bucket, Key=place)
            with answer["Body"] as stream:
                size = answer["ContentLength"]
                if size > limit_bytes:
                    raise UnreadableError(f"{self.name}/{key}: {size} bytes, expected at most {limit_bytes}")
                data = bytearray(size)
                for _ in _steps(stream, memoryview(data), deadline):
                    pass
                return bytes(data)

        return self._calls.run("read", key, request)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self._place(key)
        buffer = buffer.cast("B")
        begins = range(0, len(buffer), _READ_BYTES)
        if len(begins) <= 1:
            self._read_range(key, start, buffer)
            return
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3-read") as pool:
            ranges = [(start + begin, buffer[begin : begin + _READ_BYTES]) for begin in begins]
            futures = [pool.submit(self._read_range, key, *part) for part in ranges]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _read_range(self, key: str, start: int, buffer: memoryview) -> None:
        """One range; after a broken connection it goes on where it was."""
        place, stop, done = self._place(key), start + len(buffer), 0

        def request(deadline: float) -> None:
            nonlocal done
            answer = self._client.get_object(Bucket=self._bucket, Key=place, Range=f"bytes={start + done}-{stop - 1}")
            with answer["Body"] as stream:
                self._check_range(key, answer, start + done, stop)
                for count in _steps(stream, buffer[done:], deadline):
                    done += count

        if len(buffer):
            self._calls.run("read", key, request)

    def _check_range(self, key: str, answer: Any, start: int, stop: int) -> None:
        """The answer holds bytes start..stop of the object."""
        said = answer.get("ContentRange", f"bytes 0-{answer['ContentLength'] - 1}/{answer['ContentLength']}")
        span, _, size = said.removeprefix("bytes ").partition("/")
        if size.isdecimal() and int(size) < stop:
            raise UnreadableError(f"{self.name}/{key} ends at byte {size}, expected {stop}")
        if span != f"{start}-{stop - 1}" and not (start == 0 and "ContentRange" not in answer):
            raise StorageError(f"cannot read {self.name}/{key}: asked for bytes {start}-{stop - 1}, got {said}")

    def size(self, key: str) -> int | None:
        place = self._place(key)
        with suppress(UnreadableError):
            found = self._calls.run("look up", key, lambda _: self._client.head_object(Bucket=self._bucket, Key=place))
            return int(found["ContentLength"])
        return None

    def list(self, folder: str) -> list[Entry]:
        entries = []
        for item in self._objects(self._below(folder)):
            key = item["Key"].removeprefix(self._prefix)
            with suppress(StorageError):  # foreign names
                check_key(key)
                entries.append(Entry(key, item["Size"], item["LastModified"].timestamp()))
        return sorted(entries, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        place = self._place(key)
        with suppress(UnreadableError):
            self._calls.run("delete", key, lambda _: self._client.delete_object(Bucket=self._bucket, Key=place))

    def delete_folder(self, folder: str) -> None:
        check_key(folder)
        below = self._below(folder)
        places = [item["Key"] for item in self._objects(below)]
        for begin in range(0, len(places), _BATCH):
            self._delete_batch(folder, places[begin : begin + _BATCH])
        self._abort_uploads(below, time.time() + 365 * 86_400)

    def sweep(self, older_than_seconds: float) -> None:
        self._abort_uploads(self._prefix, time.time() - older_than_seconds)

    def _delete_batch(self, folder: str, places: Sequence[str]) -> None:
        left = places

        def request(_: float) -> None:
            nonlocal left
            wanted = {"Objects": [{"Key": place} for place in left], "Quiet": True}
            errors = self._client.delete_objects(Bucket=self._bucket, Delete=wanted).get("Errors", [])
            errors = [error for error in errors if error.get("Code") != "NoSuchKey"]
            if errors:
                left = [error["Key"] for error in errors]
                raise ClientError({"Error": errors[0]}, "DeleteObjects")

        self._calls.run("delete", folder, request)

    def _abort_uploads(self, below: str, before: float) -> None:
        """Abort unfinished uploads of objects named `below`..., begun before that time (seconds since the epoch)."""
        try:
            found = list(self._uploads(below))
        except RefusedError as error:
            if error.code not in ("NotImplemented", "501", "MethodNotAllowed", "405"):
                raise
            logger.debug("%s: unfinished uploads stay: %s", self.name, error)
            return
        for upload in found:
            if upload["Initiated"].timestamp() < before:
                names = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                key = upload["Key"].removeprefix(self._prefix)
                with suppress(UnreadableError):
                    self._abort(key, names)

    def _abort(self, key: str, names: dict[str, str]) -> None:
        try:
            self._calls.run("abort the upload of", key, lambda _: self._client.abort_multipart_upload(**names))
        except RefusedError as error:
            if error.code != "NoSuchUpload":
                raise

    def _objects(self, below: str) -> Iterator[Any]:
        """What the server knows of each object whose name begins so."""
        more: dict[str, str] = {}
        while True:
            page = self._page("list_objects_v2", below, more)
            yield from page.get("Contents", [])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def _uploads(self, below: str) -> Iterator[Any]:
        more: dict[str, str] = {}
        while True:
            page = self._page("list_multipart_uploads", below, more)
            # A server that knows no Prefix here must not make us abort the uploads of others.
            yield from (upload for upload in page.get("Uploads", []) if upload["Key"].startswith(below))
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _page(self, what: str, below: str, more: dict[str, str]) -> Any:
        def request(_: float) -> Any:
            return getattr(self._client, what)(Bucket=self._bucket, Prefix=below, **more)

        return self._calls.run("list", below.removeprefix(self._prefix).rstrip("/"), request)

    def _place(self, key: str) -> str:
        """The object's whole name in the bucket. Raises StorageError on a bad key."""
        check_key(key)
        return self._prefix + key

    def _below(self, folder: str) -> str:
        return f"{self._place(folder)}/" if folder else self._prefix

    def _target(self, key: str) -> Target:
        return Target(self._client, self._calls, self._bucket, self._place(key), key, self._with_md5)


def _steps(stream: Any, buffer: memoryview, deadline: float) -> Iterator[int]:
    """Fill the buffer; yields the bytes of each step. Raises OSError when the answer ends early or takes too long."""
    # read1 gives what has come, so that time is looked at; `read`, all that an old urllib3 has, waits for the rest.
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
