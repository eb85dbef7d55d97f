"""Retries failed requests to S3 until a deadline, and turns failures into messages for the user.

`ckpt.s3.deadline_seconds` limits the attempts by time. botocore's retry modes count attempts instead, and share a quota
among all requests of a client, which an outage of minutes exhausts. Exceptions of boto3 are not passed on, because
their texts and arguments may contain secrets.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError
from urllib3.exceptions import ReadTimeoutError as SilenceError

from internlm_lite.checkpoint.storage.base import UnreachableError, UnreadableError
from internlm_lite.checkpoint.storage.retry import FailedAttempt, keep_trying
from internlm_lite.errors import StorageError

T = TypeVar("T")

_FAILURES = (boto.BotoCoreError, boto.ClientError, ResponseParserError, HTTPError, OSError, KeyError, ValueError)
_SETTINGS = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError)
_PASSING_STATUS = (408, 429)
_LASTING_STATUS = (501, 505)
# Error codes with status 4xx, or within an answer of status 200, for which another attempt may succeed.
_PASSING_CODES = (
    *("RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch", "OperationAborted"),
    *("ConditionalRequestConflict", "InternalError", "SlowDown", "ServiceUnavailable", "Throttling"),
    "RequestLimitExceeded",
)
_ABSENT = ("NoSuchKey", "404", "InvalidRange", "416")
_KEYS = "check S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY_ID, or boto3's own AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
_HINTS = {
    "NoSuchKey": "it does not exist there",
    "NoSuchBucket": "create the bucket, or correct the folder",
    "InvalidBucketName": "correct the folder, or set ckpt.s3.addressing",
    "InvalidAccessKeyId": f"wrong credentials: {_KEYS}",
    "SignatureDoesNotMatch": f"wrong credentials: {_KEYS}",
    "ExpiredToken": "the session token expired: get a new one",
    "AccessDenied": "these credentials may not do that: change them, or the bucket's policy",
    "403": "these credentials may not do that: change them, or the bucket's policy",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: set it",
    "NotImplemented": "the server cannot do that: see ckpt.s3.checksums, or use another server",
    "XMinioStorageFull": "the server's disks are full: free space or choose another folder",
    "QuotaExceeded": "the quota is used up: free space or choose another folder",
}


class RefusedError(StorageError):
    """The server refused the request, or was not reachable until the deadline."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code
        """The server's error code, such as PreconditionFailed; "" if it did not answer."""


class NoAnswerError(RefusedError, UnreachableError):
    """Requests timed out until the deadline."""


@dataclass(frozen=True)
class Trouble:
    """The failure of one attempt."""

    text: str
    passing: bool
    """Transient: another attempt may succeed."""
    code: str = ""
    timeout: bool = False
    """There was no answer in time."""

    @property
    def absent(self) -> bool:
        """The object, or the requested range of it, does not exist."""
        return self.code in _ABSENT


class Calls:
    """Sends the requests of one storage. Thread-safe."""

    def __init__(self, name: str, deadline_seconds: float, secrets: Sequence[str], hint: str = "") -> None:
        """`hint`: ends every message about a failure."""
        self._name, self._deadline_seconds, self._secrets, self._hint = name, deadline_seconds, secrets, hint

    def deadline(self) -> float:
        """Deadline of a request that starts now, by time.monotonic()."""
        return time.monotonic() + self._deadline_seconds

    def run(
        self, verb: str, key: str, request: Callable[[], T], *, body: IO[bytes] | None = None, once: bool = False
    ) -> T:
        """`request()`, repeated until it succeeds, fails permanently, or the deadline is over; not if `once`. `body`:
        the bytes it sends, rewound before each attempt.

        Raises UnreadableError if the object is absent, else RefusedError (NoAnswerError after timeouts).
        """
        where = f"{self._name}/{key}" if key else self._name

        def attempt() -> T:
            if body is not None:
                body.seek(0)
            return request()

        def judge(error: Exception) -> FailedAttempt:
            trouble = diagnose(error)
            refused = partial(NoAnswerError if trouble.timeout else RefusedError, code=trouble.code)
            return FailedAttempt(
                text=f"cannot {verb} {where}: {self._without_secrets(trouble.text)}{self._hint}",
                error=UnreadableError if trouble.absent else refused,
                passing=trouble.passing and not once,
            )

        return keep_trying(attempt, _FAILURES, judge, self._deadline_seconds)

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def diagnose(error: Exception) -> Trouble:
    """The failure that an exception of boto3 means; the text is our own or the server's."""
    if isinstance(error, boto.ClientError):
        return _refusal(error.response)
    if isinstance(error, _SETTINGS):
        return Trouble(f"found no usable credentials: {_KEYS}", passing=False)
    if isinstance(error, boto.SSLError):
        return _tls(str(error))
    if isinstance(error, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ProxyConnectionError):
        return Trouble("no server answers there: is it up, is the endpoint right?", passing=True, timeout=True)
    if isinstance(error, boto.ReadTimeoutError | SilenceError | TimeoutError):
        return Trouble("the server fell silent, or is too slow", passing=True, timeout=True)
    if "TimeoutError" in repr(getattr(error, "kwargs", {}).get("error")):  # while sending: wrapped twice
        return Trouble("the server takes the bytes too slowly", passing=True, timeout=True)
    if isinstance(error, boto.PaginationError):
        return Trouble("its listing does not end: the same part comes again and again", passing=False)
    if isinstance(error, boto.IncompleteReadError | ResponseParserError):
        return Trouble("the answer was cut off", passing=True)
    if isinstance(error, boto.HTTPClientError | HTTPError | OSError):
        return Trouble("the connection broke", passing=True)
    if isinstance(error, boto.BotoCoreError):
        return Trouble(f"boto3 refused ({type(error).__name__})", passing=False)
    return Trouble("what answers is no S3 server: is the endpoint right?", passing=False)


def _refusal(response: Any) -> Trouble:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = response.get("Error", {})
    code = re.sub(r"[^A-Za-z0-9.]", "", str(said.get("Code", "")))[:60] or str(status)
    message = "".join(filter(str.isprintable, " ".join(str(said.get("Message", "")).split())))[:200]
    passing = code in _PASSING_CODES or status in _PASSING_STATUS or (status >= 500 and status not in _LASTING_STATUS)
    words = [code if code == str(status) else f"{code}, status {status}"] if status else [code]
    words += [message] if message and message != code else []
    hint = f" ({_HINTS[code]})" if code in _HINTS else ""
    if 300 <= status < 400:
        location = response["ResponseMetadata"].get("HTTPHeaders", {}).get("location", "")
        target = re.match(r"https?://(?:[^/@]*@)?([A-Za-z0-9.:-]+)", location)
        where = target[1] if target else "another place"
        hint = f" (it redirects to {where}: correct the endpoint, or set AWS_DEFAULT_REGION to the bucket's region)"
    return Trouble(f"the server says {': '.join(words)}{hint}", passing, code)


def _tls(text: str) -> Trouble:
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return Trouble("its certificate is not trusted here (set AWS_CA_BUNDLE to the authority's file)", passing=False)
    if "match" in text:  # the host's name and those in the certificate
        return Trouble("its certificate is for another host: correct the endpoint, or the certificate", passing=False)
    if re.search("wrong.version.number|record.layer.failure|http.request", text, re.IGNORECASE):
        return Trouble("it does not speak TLS (for plain http set ckpt.s3.insecure=True)", passing=False)
    return Trouble("the encrypted connection broke", passing=True)
