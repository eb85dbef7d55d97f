"""Parses folders and web addresses of a config, for the checks and for the code that uses them.

local:PATH, PATH                     a folder of this machine or of a shared file system
boto3:s3://BUCKET.ENDPOINT/PREFIX    a folder on S3; ENDPOINT is host[:port], BUCKET has no dot
s3://BUCKET/PREFIX                   AWS, or where boto3's own settings point (AWS_ENDPOINT_URL)
https://HOST/...                     a webhook; its address is a secret
"""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

_BUCKET = r"[A-Za-z0-9][A-Za-z0-9_-]*"
_PART = r"[^\s./?#\\](?:[^/?#\\]*[^\s/?#\\])?"
_PREFIX = rf"/+(?P<prefix>{_PART}(?:/+{_PART})*)/*"
_ENDPOINT = r"[A-Za-z0-9.-]+(?::[0-9]+)?"
_WITH_ENDPOINT = re.compile(rf"boto3:s3://(?P<bucket>{_BUCKET})\.(?P<endpoint>{_ENDPOINT}){_PREFIX}")
_PLAIN = re.compile(rf"s3://(?P<bucket>{_BUCKET}(?:\.[A-Za-z0-9_-]+)*){_PREFIX}")

S3_FORM = (
    "boto3:s3://BUCKET.ENDPOINT/PREFIX or s3://BUCKET/PREFIX, ENDPOINT being HOST[:PORT] without http://, user or "
    "password, and PREFIX any letters and signs but ?, # and \\, no part of it starting with a dot"
)

ChatFormat = Literal["feishu", "slack"]
_CHAT_FORMATS: dict[str, ChatFormat] = {"feishu.cn": "feishu", "larksuite.com": "feishu", "slack.com": "slack"}


@dataclass(frozen=True)
class S3Path:
    """A folder of a bucket, never the whole bucket: a run may delete everything below its save folder."""

    bucket: str
    endpoint: str | None
    """host[:port]; None: as boto3 is configured."""
    prefix: str
    """Segments joined by single slashes."""

    def __str__(self) -> str:
        if self.endpoint is None:
            return f"s3://{self.bucket}/{self.prefix}"
        return f"boto3:s3://{self.bucket}.{self.endpoint}/{self.prefix}"


def is_s3(text: str) -> bool:
    """Whether `text` is meant as a folder on S3; it may still be malformed."""
    return text.startswith(("boto3:", "s3:"))


def parse_s3(text: str) -> S3Path | None:
    """The folder that `text` names; None if it does not have the form of `S3_FORM`."""
    found = _WITH_ENDPOINT.fullmatch(text) or _PLAIN.fullmatch(text)
    if found is None or not text.isprintable():
        return None
    groups = found.groupdict()
    return S3Path(groups["bucket"], groups.get("endpoint"), re.sub("/+", "/", groups["prefix"]))


def without_password(text: str) -> str:
    """`text` with the user and password of an address masked."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def normalize_path(folder: str) -> str:
    """The normal form of a folder: resolves `local:`, `..`, `~`, links and trailing slashes, so that equal folders
    compare equal.
    """
    if is_s3(folder):
        return str(parse_s3(folder) or folder)
    return os.path.realpath(os.path.expanduser(folder.removeprefix("local:")))


def is_folder(text: str) -> bool:
    """Whether `text` has the form of a folder: a path, local:PATH, or a folder on S3."""
    if is_s3(text):
        return parse_s3(text) is not None
    scheme, colon, rest = text.partition(":")
    return bool(rest) if scheme == "local" and colon else bool(text) and (not colon or "/" in scheme)


def webhook_format(address: str) -> ChatFormat | None:
    """Which chat the host of `address` belongs to; None: unknown host."""
    host = _host(address) or ""
    return next((chat for domain, chat in _CHAT_FORMATS.items() if host == domain or host.endswith(f".{domain}")), None)


def webhook_problem(address: str, *, insecure: bool) -> str | None:
    """What is wrong with an address. The text holds no part of the address, which is a secret."""
    host = _host(address)
    if host is None or not (address.isascii() and address.isprintable()) or " " in address:
        return "found what is no address (not shown), expected https://HOST/..."
    if urlsplit(address).scheme == "http" and not (insecure or is_loopback(host)):
        return "found http, expected https; or set monitor.alerts.insecure=True"
    return None


def _host(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises ValueError for a port that is not a number
    except ValueError:
        return None
    return parts.hostname if parts.scheme in ("http", "https") else None


def is_loopback(host: str | None) -> bool:
    """Whether the name or address of a host always means this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
