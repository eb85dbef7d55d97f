"""Addresses of webhooks: which are safe to send to, and which chat they belong to."""

from __future__ import annotations

import ipaddress
from typing import Literal
from urllib.parse import urlsplit

_FORMATS: tuple[tuple[str, Literal["feishu", "slack"]], ...] = (
    ("feishu.cn", "feishu"),
    ("larksuite.com", "feishu"),
    ("slack.com", "slack"),
)


def webhook_format(address: str) -> Literal["feishu", "slack"] | None:
    """By the host; None where that says nothing."""
    host = _host(address) or ""
    return next((form for domain, form in _FORMATS if host == domain or host.endswith(f".{domain}")), None)


def webhook_problem(address: str, insecure: bool) -> str | None:
    """What is wrong with an address, without any part of it: it is a secret."""
    host = _host(address)
    if host is None or not (address.isascii() and address.isprintable()) or " " in address:
        return "found what is no address (not shown), expected https://HOST/..."
    if urlsplit(address).scheme == "http" and not (insecure or is_loopback(host)):
        return "found http, expected https; or set monitor.alerts.insecure=True"
    return None


def _host(address: str) -> str | None:
    try:
        parts = urlsplit(address)
        _ = parts.port  # raises ValueError where it is no number
    except ValueError:
        return None
    return parts.hostname if parts.scheme in ("http", "https") else None


def is_loopback(host: str | None) -> bool:
    """Whether a host is this machine by its very name."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
