"""Multipart upload of a stream from memory: sends PARALLEL parts at a time; aborts on failure.

create -> part 1, part 2, ...    (parallel)    -> complete: from now on the object exists

s3transfer is not used: it has no deadline per part, no Content-MD5, does not report an abort that failed, and does not
look for the object when the answer to `complete` is lost.
"""

from __future__ import annotations

import io
import logging
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from botocore.exceptions import ClientError

from internlm_lite.checkpoint.storage.base import Bytes
from internlm_lite.checkpoint.storage.s3_client import md5_header
from internlm_lite.checkpoint.storage.s3_retry import Calls, diagnose
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")

PART_BYTES = 64 * 1024 * 1024
PARALLEL = 4
"""Concurrent requests; a writer holds at most PARALLEL + 2 parts in memory."""
MOST_PARTS = 10_000
_MARK = "written-by"


class Body(io.RawIOBase):
    """Bytes to send, as a file, which boto3 does not copy; reading after the deadline raises TimeoutError."""

    def __init__(self, data: bytes | bytearray, deadline: float) -> None:
        self._data, self._deadline, self._offset = memoryview(data), deadline, 0

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self._deadline:
            raise TimeoutError("too slow")
        stop = len(self._data) if size < 0 else min(len(self._data), self._offset + size)
        start, self._offset = self._offset, stop
        return bytes(self._data[start:stop])

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._offset = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: len(self._data)}[whence]
        return self._offset

    def tell(self) -> int:
        return self._offset

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def cut(chunks: Iterable[Bytes], part_bytes: int) -> Iterator[bytearray]:
    """The chunks' bytes, copied to parts of `part_bytes` bytes; the last may be shorter, none is empty."""
    part = bytearray()
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while len(rest):
            taken = rest[: part_bytes - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == part_bytes:
                yield part
                part = bytearray()
    if part:
        yield part


def content(data: bytes | bytearray, calls: Calls, *, with_md5: bool) -> dict[str, Any]:
    """The body arguments of a request that sends `data`. The body's deadline starts now."""
    return {"Body": Body(data, calls.deadline())} | ({"ContentMD5": md5_header(data)} if with_md5 else {})


class MultipartUpload:
    """The upload of one object. Methods raise StorageError; a failed upload is aborted, if the server answers."""

    def __init__(self, client: Any, calls: Calls, key: str, names: dict[str, str]) -> None:
        """Starts the upload. `key`: the object's name in messages; `names`: its Bucket and Key."""
        self._client, self._calls, self._key, self._object = client, calls, key, names
        self._mark = uuid.uuid4().hex
        create = partial(client.create_multipart_upload, **names, Metadata={_MARK: self._mark})
        self._names = {**names, "UploadId": calls.run("write", key, lambda: create()["UploadId"])}

    def write(self, parts: Iterable[bytearray], *, with_md5: bool) -> int:
        """Send all parts and complete the upload; returns the object's size in bytes."""
        size, tags, waiting = 0, [], deque[Future[str]]()
        try:
            with ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3-put") as pool:
                for number, part in enumerate(parts, 1):
                    if number > MOST_PARTS:
                        raise StorageError(
                            f"{self._key}: more than {MOST_PARTS} parts of {len(part)} bytes, the most S3 takes in one "
                            "object: use more ranks, or a smaller zero1 group"
                        )
                    size += len(part)
                    if len(waiting) == PARALLEL:
                        tags.append(waiting.popleft().result())
                    body = content(part, self._calls, with_md5=with_md5)
                    send = partial(self._send, PartNumber=number, **body)
                    run = partial(self._calls.run, f"write part {number} of", self._key, send, body=body["Body"])
                    waiting.append(pool.submit(run))
                tags += [future.result() for future in waiting]
            self._complete(tags, size)
        except BaseException:
            self._abort()
            raise
        return size

    def _send(self, **part: Any) -> str:
        return str(self._client.upload_part(**part, **self._names)["ETag"])

    def _complete(self, tags: list[str], size: int) -> None:
        """Complete the upload. After a lost answer the upload may no longer exist: then look for the object."""
        parts = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}
        sent = False

        def request() -> None:
            nonlocal sent
            if not (sent and self._exists(size)):
                sent = True
                self._client.complete_multipart_upload(**self._names, MultipartUpload=parts)

        try:
            self._calls.run("complete", self._key, request)
        except StorageError:
            with suppress(StorageError):
                if self._calls.run("look up", self._key, partial(self._exists, size), once=True):
                    return
            raise

    def _exists(self, size: int) -> bool:
        try:
            found = self._client.head_object(**self._object)
        except ClientError as error:
            if diagnose(error).absent:
                return False
            raise
        return bool(found["ContentLength"] == size and found["Metadata"].get(_MARK) == self._mark)

    def _abort(self) -> None:
        try:
            self._calls.run("abort", self._key, partial(self._client.abort_multipart_upload, **self._names), once=True)
        except StorageError as error:
            logger.warning("%s; a later save removes its parts", error)
