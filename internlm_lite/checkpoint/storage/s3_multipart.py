"""Upload of a stream in parts, from memory: several parts at once, no more of them held than that, aborted on failure.

create -> part 1, part 2, ...    (parallel)    -> complete: only now there is an object
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
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from internlm_lite.checkpoint.storage.base import Bytes
from internlm_lite.checkpoint.storage.s3_client import md5_header
from internlm_lite.checkpoint.storage.s3_retry import Calls, diagnose
from internlm_lite.errors import StorageError

logger = logging.getLogger("internlm_lite")

PART_BYTES = 64 * 1024 * 1024
PARALLEL = 4
"""Requests at a time; a writer holds at most PARALLEL + 2 parts in memory."""
MOST_PARTS = 10_000
_MARK = "written-by"


class Body(io.RawIOBase):
    """Bytes to send: a file, which boto3 takes without a copy and reads in small pieces, and not past the deadline."""

    def __init__(self, data: bytes | bytearray, deadline: float) -> None:
        self._data = memoryview(data)
        self._deadline = deadline
        self._place = 0

    def read(self, size: int = -1) -> bytes:
        if time.monotonic() > self._deadline:
            raise TimeoutError("too slow")
        stop = len(self._data) if size < 0 else min(len(self._data), self._place + size)
        start, self._place = self._place, stop
        return bytes(self._data[start:stop])

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: len(self._data)}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def cut(chunks: Iterable[Bytes], part_bytes: int) -> Iterator[bytearray]:
    """The chunks' bytes, copied into parts of `part_bytes`; the last one may be shorter, none is empty."""
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


@dataclass(frozen=True)
class Target:
    """The object that is written."""

    client: Any
    calls: Calls
    bucket: str
    place: str
    """Its whole name in the bucket."""
    key: str
    """Its name for messages."""
    with_md5: bool

    def put(self, data: bytes | bytearray, **more: str) -> None:
        """Write it by one request."""
        self.calls.run("write", self.key, lambda deadline: self._put(data, deadline, more))

    def _put(self, data: bytes | bytearray, deadline: float, more: dict[str, str]) -> None:
        self.client.put_object(
            Bucket=self.bucket, Key=self.place, Body=Body(data, deadline), **self._check_sum(data), **more
        )

    def put_parts(self, parts: Iterable[bytearray]) -> int:
        """Write it part by part; returns its bytes. After a failure nothing stays, if the server can be reached."""
        mark = uuid.uuid4().hex
        names = {"Bucket": self.bucket, "Key": self.place}
        made = self.calls.run(
            "write", self.key, lambda _: self.client.create_multipart_upload(**names, Metadata={_MARK: mark})
        )
        names["UploadId"] = made["UploadId"]
        try:
            size, tags = self._send(parts, names)
            self._complete(names, tags, size, mark)
        except BaseException:
            self._abort(names)
            raise
        return size

    def _send(self, parts: Iterable[bytearray], names: dict[str, str]) -> tuple[int, list[str]]:
        """(bytes, the server's tag of each part)"""
        size, tags, waiting = 0, [], deque[Future[str]]()
        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="s3-put") as pool:
            for number, part in enumerate(parts, 1):
                if number > MOST_PARTS:
                    raise StorageError(
                        f"{self.key}: more than {MOST_PARTS} parts of {len(part)} bytes, the most S3 takes in one "
                        "object: use more ranks, or a smaller zero1 group"
                    )
                size += len(part)
                if len(waiting) == PARALLEL:
                    tags.append(waiting.popleft().result())
                waiting.append(pool.submit(self._send_part, number, part, names))
            tags += [future.result() for future in waiting]
        return size, tags

    def _send_part(self, number: int, part: bytearray, names: dict[str, str]) -> str:
        more = self._check_sum(part)

        def request(deadline: float) -> str:
            answer = self.client.upload_part(PartNumber=number, Body=Body(part, deadline), **names, **more)
            return str(answer["ETag"])

        return self.calls.run(f"write part {number} of", self.key, request)

    def _complete(self, names: dict[str, str], tags: list[str], size: int, mark: str) -> None:
        """Its answer may get lost after the work was done, and then the upload is unknown: so look for the object."""
        parts = {"Parts": [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]}
        asked = False

        def request(_: float) -> None:
            nonlocal asked
            if asked and self._is_there(size, mark):
                return
            asked = True
            self.client.complete_multipart_upload(**names, MultipartUpload=parts)

        try:
            self.calls.run("complete", self.key, request)
        except StorageError:
            with suppress(StorageError):
                if self.calls.run("look up", self.key, lambda _: self._is_there(size, mark), once=True):
                    return
            raise

    def _is_there(self, size: int, mark: str) -> bool:
        try:
            answer = self.client.head_object(Bucket=self.bucket, Key=self.place)
        except ClientError as error:
            if diagnose(error).absent:
                return False
            raise
        return bool(answer["ContentLength"] == size and answer["Metadata"].get(_MARK) == mark)

    def _abort(self, names: dict[str, str]) -> None:
        try:
            self.calls.run("abort", self.key, lambda _: self.client.abort_multipart_upload(**names), once=True)
        except StorageError as error:
            logger.warning("%s; a later save removes its parts", error)

    def _check_sum(self, data: bytes | bytearray) -> dict[str, str]:
        return {"ContentMD5": md5_header(data)} if self.with_md5 else {}
