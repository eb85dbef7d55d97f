"""How a config spells a folder on S3, read once for the checks and for the client.

boto3:s3://BUCKET.ENDPOINT/PREFIX    ENDPOINT is host[:port], BUCKET has no dot
s3://BUCKET/PREFIX                   AWS, or where boto3's own settings point (AWS_ENDPOINT_URL)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BUCKET = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_PREFIX = r"/+(?P<prefix>[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/+[A-Za-z0-9_-][A-Za-z0-9._-]*)*)/*"
_WITH_ENDPOINT = re.compile(rf"boto3:s3://(?P<bucket>{_BUCKET})\.(?P<endpoint>[A-Za-z0-9.-]+(?::[0-9]+)?){_PREFIX}")
_PLAIN = re.compile(rf"s3://(?P<bucket>{_BUCKET}(?:\.[A-Za-z0-9_-]+)*){_PREFIX}")

S3_SPELLING = "boto3:s3://BUCKET.ENDPOINT/PREFIX or s3://BUCKET/PREFIX, in [A-Za-z0-9._-], without user or password"


@dataclass(frozen=True)
class S3Path:
    """A folder of a bucket. Never the whole bucket: everything below a save folder is the run's to delete."""

    bucket: str
    endpoint: str | None
    """host[:port]; None: boto3 knows."""
    prefix: str
    """Segments joined by single slashes."""

    def __str__(self) -> str:
        if self.endpoint is None:
            return f"s3://{self.bucket}/{self.prefix}"
        return f"boto3:s3://{self.bucket}.{self.endpoint}/{self.prefix}"


def is_s3(text: str) -> bool:
    """Whether `text` is meant as a place on S3, well spelt or not."""
    return text.startswith(("boto3:", "s3:"))


def without_password(text: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def parse_s3(text: str) -> S3Path | None:
    """The folder that `text` names; None if it is not spelt as `S3_SPELLING` says."""
    found = _WITH_ENDPOINT.fullmatch(text) or _PLAIN.fullmatch(text)
    if found is None:
        return None
    groups = found.groupdict()
    return S3Path(groups["bucket"], groups.get("endpoint"), re.sub("/+", "/", groups["prefix"]))
