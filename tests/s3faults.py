"""A proxy in front of an S3 server that injects faults. One request per connection.

with FaultProxy(port_of_server) as proxy:
    proxy.faults.append(Fault("503", "PUT .*partNumber=2", times=3))
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import ssl
import struct
import threading
import uuid
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "500", "503", "501", "403", "301", "302", "307", "308", "reset", "hang", "slow", "truncate", "lost",
    "cut-upload", "slow-upload", "flip", "no-date", "endless", "circle", "html",
]  # fmt: skip
_ERRORS = {
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": ("503 Service Unavailable", "SlowDown", "Please reduce your request rate."),
    "501": ("501 Not Implemented", "NotImplemented", "A header you provided implies functionality we lack."),
    "403": ("403 Forbidden", "AccessDenied", "Access Denied."),
    "301": ("301 Moved Permanently", "PermanentRedirect", "Use another endpoint."),
    "302": ("302 Found", "", ""),
    "307": ("307 Temporary Redirect", "TemporaryRedirect", "Please re-send this request to the specified endpoint."),
    "308": ("308 Permanent Redirect", "", ""),
}
_BLOCK = 65_536


@dataclass
class Fault:
    """A fault of the next `times` requests whose "METHOD /path?query" or a header line contains a match of `match`.

    reset: connection reset before the server gets the request       lost: reset after the server has handled it
    hang: no answer       slow: `slow_bytes` per tenth of a second       truncate: half of the answer's body
    cut-upload: reset in the middle of the request's body       slow-upload: body read at 6 MB/s
    flip: a bit of the answer's body, in its middle       no-date: dates of the answer are none
    endless: a listing that says there is more, by one token       circle: the same by ever new ones
    html: a page for people       301 and so on: to `location`
    """

    kind: Kind
    match: str
    times: int = 1
    slow_bytes: int = 1
    location: str = ""
    hits: int = field(default=0, init=False)


class FaultProxy:
    """The proxy; it runs in a thread during its `with` block."""

    def __init__(self, server_port: int, tls: ssl.SSLContext | None = None) -> None:
        """`tls`: serve https with its certificate."""
        self.server_port, self._tls = server_port, tls
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        """All requests so far, as "METHOD /path?query"."""
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ready = threading.Event()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(10)

    def _stop(self) -> None:
        for task in asyncio.all_tasks(self._loop):
            task.cancel()

    def _run(self) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._serve())
        if left := asyncio.all_tasks(self._loop):
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._handle, "127.0.0.1", 0, limit=1 << 20, ssl=self._tls)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        async with server:
            await server.serve_forever()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await self._exchange(reader, writer)
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *headers = head.split("\r\n")
        request = line.rsplit(" ", 1)[0]
        self.seen.append(request)
        fault = self._fault(request, headers)
        kind = fault.kind if fault else None
        length = next((int(h.split(":")[1]) for h in headers if h.lower().startswith("content-length:")), 0)
        if any(h.lower().startswith("expect:") for h in headers):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if kind == "hang":
            await asyncio.sleep(3600)
        if kind == "cut-upload":
            await reader.readexactly(length // 2)
        if kind in ("reset", "cut-upload"):
            return _reset(writer)
        if kind in _ERRORS:
            await reader.readexactly(length)
            return await _answer_error(kind, writer, fault.location if fault else "")
        answer, server = await asyncio.open_connection("127.0.0.1", self.server_port)
        with contextlib.closing(server):  # a writer without references would close itself
            await _forward(line, headers, reader, length, server, 0.01 if kind == "slow-upload" else 0.0)
            if kind == "lost":
                await answer.read()
                return _reset(writer)
            await _answer(answer, writer, fault)

    def _fault(self, request: str, headers: list[str]) -> Fault | None:
        for fault in self.faults:
            if fault.hits < fault.times and any(re.search(fault.match, text) for text in [request, *headers]):
                fault.hits += 1
                return fault
        return None


async def _forward(
    line: str,
    headers: list[str],
    reader: asyncio.StreamReader,
    length: int,
    server: asyncio.StreamWriter,
    pause_seconds: float,
) -> None:
    kept = [h for h in headers if h and not h.lower().startswith(("expect:", "connection:"))]
    server.write("\r\n".join([line, *kept, "Connection: close", "", ""]).encode("latin-1"))
    while length:
        block = await reader.read(min(length, _BLOCK))
        if not block:
            return
        server.write(block)
        await server.drain()
        length -= len(block)
        await asyncio.sleep(pause_seconds)


async def _answer(answer: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: Fault | None) -> None:
    head = await answer.readuntil(b"\r\n\r\n")
    if fault is not None and fault.kind in _CHANGES:
        return writer.write(b"".join(_CHANGES[fault.kind](head, await answer.read())))
    writer.write(head)
    if fault is None or fault.kind == "slow-upload":
        while block := await answer.read(_BLOCK):
            writer.write(block)
            await writer.drain()
        return
    body = await answer.read()
    if fault.kind == "truncate":
        writer.write(body[: len(body) // 2])
    else:
        for begin in range(0, len(body), fault.slow_bytes):
            writer.write(body[begin : begin + fault.slow_bytes])
            await writer.drain()
            await asyncio.sleep(0.1)
    await writer.drain()


def _flipped(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    middle = len(body) // 2
    return head, body[:middle] + bytes(byte ^ 4 for byte in body[middle : middle + 1]) + body[middle + 1 :]


def _without_dates(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    body = re.sub(rb"<(LastModified|Initiated)>[^<]*", rb"<\1>soon", body)
    return _resized(re.sub(rb"(?i)(last-modified): [^\r]*", rb"\1: soon", head), body)


def _endless(head: bytes, body: bytes, token: str = "more") -> tuple[bytes, bytes]:
    names = ("NextContinuationToken", "NextKeyMarker", "NextUploadIdMarker")
    more = "<IsTruncated>true</IsTruncated>" + "".join(f"<{name}>{token}</{name}>" for name in names)
    body = re.sub(rb"<(Next\w+|IsTruncated)>[^<]*</\1>|<Next\w+/>", b"", body)
    return _resized(head, re.sub(rb"</Name>|</Bucket>", lambda found: found[0] + more.encode(), body, count=1))


def _circle(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    return _endless(head, body, uuid.uuid4().hex)


def _resized(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    if not body:  # of HEAD
        return head, body
    return re.sub(rb"(?i)(content-length): \d+", b"Content-Length: %d" % len(body), head), body


def _html(head: bytes, body: bytes) -> tuple[bytes, bytes]:
    page = b"<!DOCTYPE html><html><body><p>Sign in</body></html>"
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n" % len(page), page


_CHANGES = {"flip": _flipped, "no-date": _without_dates, "endless": _endless, "circle": _circle, "html": _html}


async def _answer_error(kind: str, writer: asyncio.StreamWriter, location: str) -> None:
    status, code, message = _ERRORS[kind]
    body = (
        f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
    )
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    head += f"Location: {location}\r\n" if location else ""
    writer.write(head.encode() + b"\r\n" + body)
    await writer.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close the connection by RST instead of FIN."""
    found = writer.get_extra_info("socket")
    found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.close()
