"""The dashboard's server: one page and its data, read-only, for this machine only unless protected by a token.

GET /                                            the page with the current data
GET /api/runs                                    the data: payload.py's, with a "token"
GET /api/since?after=TOKEN                       the same, or 304 when nothing has changed
GET /api/series?run=r0&from=A&to=B&points=N      the curves of a range of steps
GET /metrics                                     the newest figures for Prometheus (prometheus.py)

Programs send the token as "Authorization: Bearer TOKEN" in place of the cookie.
"""

from __future__ import annotations

import gzip
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from internlm_lite.apps.report.live_runs import LiveRuns
from internlm_lite.apps.report.page import ASSETS, Assets, render_page
from internlm_lite.apps.report.payload import POINTS
from internlm_lite.apps.report.prometheus import CONTENT_TYPE
from internlm_lite.errors import ConfigError

logger = logging.getLogger("internlm_lite")

MAX_POINTS = 20_000
MIN_TOKEN = 8
_ALWAYS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_EVERYWHERE = ("0.0.0.0", "::")
_NOTHING = "default-src 'none'; frame-ancestors 'none'"


@dataclass(frozen=True)
class Response:
    """Body and headers of a response. `policy`: its content security policy."""

    status: HTTPStatus
    body: bytes = b""
    kind: str = "text/plain; charset=utf-8"
    policy: str = _NOTHING
    headers: Mapping[str, str] = field(default_factory=dict)
    packed: bytes = b""
    """The body compressed, if many ask for it."""

    @staticmethod
    def refusal(status: HTTPStatus, text: str) -> Response:
        return Response(status, f"{text}\n".encode())

    @staticmethod
    def json(value: Any) -> Response:
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        return Response(HTTPStatus.OK, text.encode(), "application/json")


class Dashboard(ThreadingHTTPServer):
    """Serves the data of `runs` until `shutdown`. Use as a context manager. The caller closes `runs`."""

    daemon_threads = True
    request_queue_size = 512
    """Connections that may wait to be accepted."""

    def __init__(
        self, runs: LiveRuns, port: int, bind: str = "127.0.0.1", token: str | None = None, assets: Path = ASSETS
    ) -> None:
        """`port` 0 takes a free one. Raises ConfigError: port in use, no such address, public without a token."""
        self.runs, self.assets = runs, Assets.read(assets)
        self._token = token
        if token is not None and len(token) < MIN_TOKEN:
            raise ConfigError(f"--token: expected at least {MIN_TOKEN} characters")
        if token is None and not _is_loopback(bind):
            raise ConfigError(
                f"--bind {bind}: others can reach that address; add --token-file FILE (or --token) to keep them out"
            )
        self._made: dict[str, tuple[str, Response]] = {}
        self._making = threading.Lock()
        self._bind = bind
        if ":" in bind:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((bind, port), _Handler)
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {bind} port {port}: {error.strerror}; choose another --port (0: any free one)"
            ) from error

    def server_bind(self) -> None:
        """Bind without HTTPServer's lookup of the host name, which may be slow and is not needed."""
        TCPServer.server_bind(self)

    @property
    def address(self) -> str:
        """The URL to open, including the token if there is one."""
        host = socket.gethostname() if self._bind in _EVERYWHERE else self._bind
        query = f"?token={quote(self._token, safe='')}" if self._token else ""
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_address[1]}/{query}"

    @property
    def cookie(self) -> str:
        """The cookie's name, with the port: browsers share cookies between the ports of a host."""
        return f"dashboard-{self.server_address[1]}"

    @property
    def cookie_value(self) -> str | None:
        """The cookie's value for a browser that has sent the token."""
        return None if self._token is None else hashlib.sha256(f"dashboard {self._token}".encode()).hexdigest()

    def current(self, path: str) -> Response:
        """The page, or its data, made once for all who ask before anything changes."""
        with self._making:
            token, made = self._made.get(path, ("", None))
            if made is None or token != self.runs.token():
                payload = self.runs.payload()
                made = self._page(payload) if path == "/" else Response.json(payload)
                made = replace(made, packed=gzip.compress(made.body, 1))
                self._made[path] = payload["token"], made
            return made

    def _page(self, payload: Mapping[str, Any]) -> Response:
        policy = f"{self.assets.policy(live=True)}; frame-ancestors 'none'"
        return Response(HTTPStatus.OK, render_page(payload, self.assets).encode(), "text/html; charset=utf-8", policy)

    def accepts_token(self, token: str) -> bool:
        return self._token is not None and hmac.compare_digest(token.encode(), self._token.encode())

    def trusts_host(self, host: str) -> bool:
        """Whether a Host header names this server; a foreign page may resolve its own name to it (DNS rebinding).

        With a token any name is allowed: the cookie is not sent to another name.
        """
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return self._token is not None or name in {"127.0.0.1", "localhost", "::1", self._bind.lower()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignored: closed connections are normal, and other errors were logged where they occurred."""


class _Handler(BaseHTTPRequestHandler):
    server: Dashboard
    timeout = 30

    def do_GET(self) -> None:
        self._send(self._answer())

    do_HEAD = do_GET

    def _refuse(self) -> None:
        refusal = Response.refusal(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD: this server is read-only")
        self._send(Response(refusal.status, refusal.body, headers={"Allow": "GET, HEAD"}))

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = _refuse

    def _answer(self) -> Response:
        if not self.server.trusts_host(self.headers.get("Host", "")):
            return Response.refusal(HTTPStatus.FORBIDDEN, "unknown Host; open the address that the dashboard printed")
        try:
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, max_num_fields=8))
        except ValueError:
            return Response.refusal(HTTPStatus.BAD_REQUEST, "not an address of this server")
        if self.server.cookie_value is not None and not self._is_known(self.server.cookie_value):
            return self._log_in(query.get("token", ""))
        try:
            return self._routed(url.path, query)
        except Exception as error:
            logger.exception("dashboard: %s", url.path)
            return Response.refusal(HTTPStatus.INTERNAL_SERVER_ERROR, type(error).__name__)

    def _is_known(self, expected: str) -> bool:
        kind, _, given = self.headers.get("Authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.server.accepts_token(given.strip()):
            return True
        pairs = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        values = [value for name, _, value in pairs if name == self.server.cookie]
        return any(hmac.compare_digest(value.encode(), expected.encode()) for value in values)

    def _log_in(self, token: str) -> Response:
        """For the right token, set a cookie and redirect to the URL without the token."""
        if not self.server.accepts_token(token):
            return Response.refusal(HTTPStatus.FORBIDDEN, "open the address with ?token=... that the dashboard printed")
        cookie = f"{self.server.cookie}={self.server.cookie_value}; Path=/; HttpOnly; SameSite=Strict"
        return Response(HTTPStatus.SEE_OTHER, headers={"Location": "/", "Set-Cookie": cookie})

    def _routed(self, path: str, query: Mapping[str, str]) -> Response:
        runs = self.server.runs
        if path == "/favicon.ico":
            return Response(HTTPStatus.NO_CONTENT)
        if path not in ("/", "/api/runs", "/api/since", "/api/series", "/metrics"):
            return Response.refusal(HTTPStatus.NOT_FOUND, "not found")
        if path == "/api/series":
            return self._series(query)
        runs.refresh()
        if path == "/metrics":
            return Response(HTTPStatus.OK, runs.metrics().encode(), CONTENT_TYPE)
        if path == "/api/since" and query.get("after") == runs.token():
            return Response(HTTPStatus.NOT_MODIFIED)
        return self.server.current("/" if path == "/" else "/api/runs")

    def _series(self, query: Mapping[str, str]) -> Response:
        try:
            begin, end = float(query.get("from", "-inf")), float(query.get("to", "inf"))
            points = min(MAX_POINTS, max(2, int(query.get("points", POINTS))))
        except ValueError:
            begin = end = math.nan
        if math.isnan(begin) or math.isnan(end):
            return Response.refusal(
                HTTPStatus.BAD_REQUEST, "expected numbers: from and to are steps, points is how many"
            )
        found = self.server.runs.series(query.get("run", ""), begin, end, points)
        return Response.refusal(HTTPStatus.NOT_FOUND, "no such run") if found is None else Response.json(found)

    def _send(self, answer: Response) -> None:
        body = answer.body
        headers = {**_ALWAYS, "Content-Security-Policy": answer.policy, **answer.headers}
        if answer.status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            accepted = getattr(self, "headers", None) and self.headers.get("Accept-Encoding", "")
            if accepted and "gzip" in accepted and len(body) > 1024:
                body = answer.packed or gzip.compress(body, 1)
                headers |= {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"}
            headers |= {"Content-Type": answer.kind, "Content-Length": str(len(body))}
        self.send_response(answer.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Called by the base class for invalid requests."""
        self._send(Response.refusal(HTTPStatus(code), message or HTTPStatus(code).phrase))

    def version_string(self) -> str:
        return "internlm_lite"

    def log_message(self, format: str, *args: Any) -> None:
        """No access log: URLs may contain the token."""


def _is_loopback(bind: str) -> bool:
    try:
        return ipaddress.ip_address(bind).is_loopback
    except ValueError:
        return bind == "localhost"
