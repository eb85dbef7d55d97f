"""The dashboard's server: who may ask what, and what comes back."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from internlm_lite.apps.report import live_runs
from internlm_lite.apps.report.live_runs import LiveRuns
from internlm_lite.apps.report.server import Dashboard
from internlm_lite.errors import ConfigError
from tests.apps.report.small import event, line, run_folder, write

TOKEN = "a token/with=odd&characters"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)


class Client:
    """Asks one server. `headers` replace what http.client would send."""

    def __init__(self, port: int) -> None:
        self.port = port

    def __call__(self, path: str, method: str = "GET", **headers: str) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Reply(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def raw(self, text: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as connection:
            connection.sendall(text)
            return b"".join(iter(lambda: connection.recv(65536), b""))


@contextmanager
def serving(*paths: Path, token: str | None = None) -> Iterator[Client]:
    watch = LiveRuns(paths)
    try:
        with Dashboard(watch, 0, token=token) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()
            try:
                yield Client(server.server_address[1])
            finally:
                server.shutdown()
                thread.join(10)
    finally:
        watch.close()


def settled(ask: Client) -> dict[str, Any]:
    """The data once everything has been read."""
    for _ in range(3000):
        payload = ask("/api/runs").json()
        if not any(run["parsing"] for run in payload["runs"]):
            return payload
        threading.Event().wait(0.02)
    raise AssertionError("still reading")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "job"
    run_folder(
        folder / "a", [line(step) for step in range(50)], [event("start", 0, step=0), event("done", 60, step=50)]
    )
    run_folder(folder / "b", [line(step, loss=3.0) for step in range(5)], [event("done", 60, step=5)])
    return folder


@pytest.fixture(scope="module")
def ask(job: Path) -> Iterator[Client]:
    with serving(job) as client:
        settled(client)
        yield client


def test_the_page_carries_its_data_and_its_policy(ask: Client) -> None:
    reply = ask("/")
    assert (reply.status, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    data = re.search(rb'id="payload">(.*?)</script>', reply.body, re.DOTALL)
    assert data is not None
    payload = json.loads(data[1])
    assert payload["live"] is True
    assert payload["token"]
    assert [run["name"] for run in payload["runs"]] == ["job/b", "job/a"]
    assert "connect-src 'self'" in reply.headers["content-security-policy"]
    assert "frame-ancestors 'none'" in reply.headers["content-security-policy"]
    assert b"frame-ancestors" not in reply.body


@pytest.mark.parametrize("path", ["/", "/api/runs", "/api/series?run=r0", "/nothing", "/favicon.ico"])
def test_every_answer_bears_the_guards(ask: Client, path: str) -> None:
    headers = ask(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert headers["x-frame-options"] == "DENY"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["server"] == "internlm_lite"


def test_only_get_and_head(ask: Client) -> None:
    for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"):
        reply = ask("/api/runs", method)
        assert (reply.status, reply.headers["allow"]) == (405, "GET, HEAD")
    assert ask("/", "BREW").status == 501
    head = ask("/api/runs", "HEAD")
    assert (head.status, head.body) == (200, b"")
    assert int(head.headers["content-length"]) == len(ask("/api/runs").body)


@pytest.mark.parametrize(
    "path",
    [
        "/..",
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/metrics.jsonl",
        "/a/metrics.jsonl",
        "/api",
        "/api/runs/",
        "//api/runs",
        "/api/run%00s",
        "/index.html",
        "/assets/app/00-words.js",
    ],
)
def test_there_are_no_files_to_reach(ask: Client, path: str) -> None:
    reply = ask(path)
    if path == "//api/runs":  # Python's own server reads this as /api/runs
        assert reply.status in (200, 404)
    else:
        assert (reply.status, reply.body) == (404, b"not found\n")


def test_garbled_requests_are_refused_in_one_line(ask: Client) -> None:
    assert ask.raw(b"GET\r\n\r\n") == b"Bad request syntax ('GET')\n"
    assert b" 400 " in ask.raw(b"GET http://[ HTTP/1.0\r\nHost: localhost\r\n\r\n").splitlines()[0]
    many = "&".join(f"a{number}=1" for number in range(20))
    assert ask(f"/api/runs?{many}").status == 400


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost.evil:80", "192.168.0.1"]
)
def test_another_name_for_this_machine_is_refused(ask: Client, host: str) -> None:
    assert ask("/", Host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:1234", "[::1]:80"])
def test_our_own_names_are_not(ask: Client, host: str) -> None:
    assert ask("/", Host=host).status == 200


def test_gzip_where_it_is_accepted(ask: Client) -> None:
    plain = ask("/api/series?run=r1")
    packed = ask("/api/series?run=r1", Accept_Encoding="gzip, br")
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert gzip.decompress(packed.body) == plain.body


def test_a_range_of_one_run(ask: Client) -> None:
    found = ask("/api/series?run=r1&from=10&to=19&points=1000").json()
    assert found["step"] == list(range(10, 20))
    assert len(ask("/api/series?run=r1&points=10").json()["step"]) == 10
    assert len(ask("/api/series?run=r1&points=-5").json()["step"]) == 2
    assert ask("/api/series?run=r1&from=99").json()["step"] == []
    assert ask("/api/series?run=r0").json()["loss"] == [3] * 5


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("run=r9", 404),
        ("", 404),
        ("run=../a", 404),
        ("run=r0&from=x", 400),
        ("run=r0&to=nan", 400),
        ("run=r0&points=1e3", 400),
        ("run=r0&points=" + "9" * 5000, 400),
        ("run=r0&from=-inf&to=inf", 200),
    ],
)
def test_odd_ranges(ask: Client, query: str, status: int) -> None:
    assert ask(f"/api/series?{query}").status == status


def test_nothing_new_is_304_and_news_come_with_another_token(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [line(0)], [event("done", 1)])
    with serving(folder) as ask:
        token = settled(ask)["token"]
        same = ask(f"/api/since?after={token}")
        assert (same.status, same.body) == (304, b"")
        assert ask("/api/since").status == ask("/api/since?after=other").status == 200
        write(folder / "metrics.jsonl", [line(1)], "a")
        news = ask(f"/api/since?after={token}")
        for _ in range(1200):  # at the latest the next poll has it
            if news.status == 200:
                break
            threading.Event().wait(0.05)
            news = ask(f"/api/since?after={token}")
        assert news.json()["runs"][0]["series"]["step"] == [0, 1]
        assert ask(f"/api/since?after={news.json()['token']}").status == 304


def test_runs_that_come_later_are_shown_and_ids_stay(tmp_path: Path) -> None:
    job = tmp_path / "job"
    run_folder(job / "2026-11-20", [line(0)])
    with serving(job) as ask:
        token = settled(ask)["token"]
        run_folder(job / "2026-11-21", [line(0), line(1)])
        for _ in range(1200):
            if ask(f"/api/since?after={token}").status == 200:
                break
            threading.Event().wait(0.05)
        found = settled(ask)["runs"]
        assert [(run["id"], run["name"]) for run in found] == [("r1", "job/2026-11-21"), ("r0", "job/2026-11-20")]
        assert ask("/api/series?run=r1").json()["step"] == [0, 1]


def test_it_answers_while_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    poll = live_runs.RunReader.poll
    monkeypatch.setattr(live_runs.RunReader, "poll", lambda run: go.wait(20) and poll(run))
    with serving(run_folder(tmp_path, [line(0)])) as ask:
        (run,) = ask("/api/runs").json()["runs"]
        assert (run["parsing"], run["state"]["phase"], run["series"]["step"]) == (True, "starting", [])
        go.set()
        assert settled(ask)["runs"][0]["series"]["step"] == [0]


def test_a_run_that_vanishes_stays_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_folder(tmp_path / "run", [line(0)])
    with serving(folder) as ask:
        settled(ask)
        folder.rename(tmp_path / "away")
        for _ in range(3):
            assert len(ask("/api/runs").json()["runs"]) == 1
            threading.Event().wait(live_runs.PAUSE_SECONDS)
    assert sum("cannot read" in record.getMessage() for record in caplog.records) <= 1


def test_a_run_that_cannot_be_read_says_so_and_harms_no_other(tmp_path: Path) -> None:
    good, bad = (run_folder(tmp_path / name, [line(0)], [event("done", 1)]) for name in ("b", "a"))
    (bad / "events.jsonl").unlink()
    os.mkfifo(bad / "events.jsonl")
    with serving(good, bad) as ask:
        for _ in range(1200):
            found = ask("/api/runs").json()
            if found["runs"][1]["state"]["phase"] == "unreadable" and not found["runs"][0]["parsing"]:
                break
            threading.Event().wait(0.05)
        assert [run["state"]["phase"] for run in found["runs"]] == ["done", "unreadable"]
        why = found["runs"][1]["state"]["why"]
        assert why == f"cannot read {bad / 'events.jsonl'}: not a regular file"
        assert ask(f"/api/since?after={found['token']}").status == 304
        (bad / "events.jsonl").unlink()
        write(bad / "events.jsonl", [event("done", 1)])
        for _ in range(1200):
            if ask(f"/api/since?after={found['token']}").status == 200:
                break
            threading.Event().wait(0.05)
        assert settled(ask)["runs"][1]["state"]["phase"] == "done"


def test_a_token_opens_the_page_once_and_a_cookie_from_then_on(job: Path) -> None:
    with serving(job, token=TOKEN) as ask:
        assert ask("/").status == ask("/api/runs").status == ask("/nothing").status == 403
        assert ask("/?token=wrong").status == ask("/?token=").status == ask("/?token=%E2%82%AC").status == 403
        admitted = ask("/?token=a%20token/with=odd%26characters")
        assert (admitted.status, admitted.headers["location"]) == (303, "/")
        cookie, *flags = admitted.headers["set-cookie"].split("; ")
        assert flags == ["Path=/", "HttpOnly", "SameSite=Strict"]
        assert "token" not in cookie
        assert ask("/", Cookie=f"other=1; {cookie}").status == 200
        assert ask("/api/runs", Cookie=cookie).status == 200
        assert ask("/", Cookie=f"{cookie}x").status == ask("/", Cookie=cookie.split("=")[0]).status == 403
        assert ask("/", "POST", Cookie=cookie).status == 405


def test_200_connections_at_once_are_answered(ask: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = LiveRuns.payload
    monkeypatch.setattr(LiveRuns, "payload", lambda runs: made.append("") or make(runs))
    address = ("127.0.0.1", ask.port)
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(200)]
        for connection in connections:
            connection.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        for connection in connections:
            body = b"".join(iter(partial(connection.recv, 1 << 20), b""))
            assert body.startswith(b"HTTP/1.0 200 ") and body.endswith(b"</html>\n")
    assert len(made) <= 1  # what is the same for all is made once


def test_what_is_refused_before_listening(job: Path) -> None:
    watch = LiveRuns([job])
    try:
        with pytest.raises(ConfigError, match=r"--bind 0.0.0.0: others can reach that address; add --token-file FILE"):
            Dashboard(watch, 0, bind="0.0.0.0")
        with pytest.raises(ConfigError, match="expected at least 8 characters"):
            Dashboard(watch, 0, bind="0.0.0.0", token="short")
        with pytest.raises(ConfigError, match=r"cannot listen on 192.0.2.1 port 0: .*; choose another"):
            Dashboard(watch, 0, bind="192.0.2.1", token=TOKEN)
        with Dashboard(watch, 0) as server, pytest.raises(ConfigError, match=r"port \d+: Address already in use"):
            Dashboard(watch, server.server_address[1])
        with Dashboard(watch, 0, bind="0.0.0.0", token=TOKEN) as server:
            assert server.address.endswith("/?token=a%20token%2Fwith%3Dodd%26characters")
    finally:
        watch.close()


def test_an_error_inside_is_one_short_answer(ask: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(LiveRuns, "token", fail)
    reply = ask("/api/runs")
    assert (reply.status, reply.body) == (500, b"ZeroDivisionError\n")
