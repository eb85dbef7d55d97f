"""Messages to a chat over a real socket: shapes, retries, a server that hangs, and a secret that stays one."""

from __future__ import annotations

import socket
import ssl
import time
from typing import Any

import pytest
import trustme

from internlm_lite.config.paths import ChatFormat, webhook_format, webhook_problem
from internlm_lite.monitor import webhook as module
from internlm_lite.monitor.webhook import Webhook
from tests.monitor.chat import SECRET, Chat


def send(address: str, *texts: str, form: ChatFormat = "slack", timeout_seconds: float = 5.0) -> Webhook:
    """Sends and waits until everything is worked off."""
    hook = Webhook(address, form, timeout_seconds=timeout_seconds, first_wait_seconds=0.01)
    for text in texts:
        hook.send(text)
    vars(hook)["_queue"].join()  # a close would cut further tries short
    hook.close()
    return hook


@pytest.mark.parametrize(
    ("form", "body"),
    [("slack", {"text": "loss 3 ✓"}), ("feishu", {"msg_type": "text", "content": {"text": "loss 3 ✓"}})],
)
def test_the_shape_of_a_message(chat: Chat, form: ChatFormat, body: Any, caplog: pytest.LogCaptureFixture) -> None:
    chat.answers = [(200, '{"code": 0, "msg": "success"}')]
    send(chat.address, "loss 3 ✓", form=form)
    assert chat.seen == [(f"/{SECRET}", "application/json; charset=utf-8", body)]
    assert not caplog.records


def test_a_server_in_trouble_is_tried_again(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    chat.answers = [(500, ""), (429, ""), (200, "ok"), (200, "ok")]
    send(chat.address, "a", "b")
    assert [body["text"] for _, _, body in chat.seen] == ["a", "a", "a", "b"]
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "status", "text", "tries", "shown"),
    [
        ("slack", 500, "", 4, "HTTP 500"),
        ("slack", 404, "no_team", 1, "HTTP 404"),
        ("slack", 302, "", 1, "HTTP 302"),
        ("feishu", 200, '{"code": 19001, "msg": "param invalid"}', 4, "Feishu code 19001"),
        ("feishu", 200, "<html>", 4, "no Feishu answer"),
        ("feishu", 200, "[]", 4, "no Feishu answer"),
    ],
)
def test_what_fails_is_told_once_and_without_the_address(
    chat: Chat, form: ChatFormat, status: int, text: str, tries: int, shown: str, caplog: pytest.LogCaptureFixture
) -> None:
    chat.answers = [(status, text)]
    hook = send(chat.address, "a", "b", form=form)
    assert len(chat.seen) == 2 * tries
    assert [record.getMessage() for record in caplog.records] == [
        f"an alert did not reach monitor.alerts.webhook ({shown}); it stands in events.jsonl"
    ]
    assert SECRET not in repr(hook) + str(vars(hook)["_queue"])


def test_a_server_that_hangs(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    chat.answers = [(0, "")]
    send(chat.address, "a", timeout_seconds=0.05)
    end = time.monotonic() + 30
    while len(chat.seen) < 4 and time.monotonic() < end:  # it may read what it was sent after the sender has gone
        time.sleep(0.005)
    assert len(chat.seen) == 4 and "(TimeoutError)" in caplog.text and SECRET not in caplog.text


def test_nobody_listens(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    send(f"http://127.0.0.1:{port}/{SECRET}", "a")
    assert "(ConnectionRefusedError: Connection refused)" in caplog.text and SECRET not in caplog.text


def test_a_certificate_nobody_vouches_for(caplog: pytest.LogCaptureFixture, chat: Chat) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    chat.socket = context.wrap_socket(chat.socket, server_side=True, do_handshake_on_connect=False)
    send(chat.address.replace("http:", "https:"), "a")
    assert "(SSLCertVerificationError)" in caplog.text and not chat.seen and SECRET not in caplog.text


def test_sending_never_waits(chat: Chat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "CAPACITY", 2)
    chat.answers = [(0, "")]
    hook = Webhook(chat.address, "slack")
    for n in range(20):
        hook.send(str(n))
    assert "(too many messages wait)" in caplog.text
    hook.close(seconds=0.05)
    chat.let_go.set()


def test_what_a_close_leaves_is_counted(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    chat.answers = [(200, "ok"), (0, "")]
    hook = Webhook(chat.address, "slack")
    for n in range(5):
        hook.send(str(n))
    while len(chat.seen) < 2:
        time.sleep(0.005)
    hook.close(seconds=0.05)
    chat.let_go.set()
    assert [record.getMessage() for record in caplog.records] == [
        "alerts that did not reach monitor.alerts.webhook before the end: 4; they stand in events.jsonl"
    ]


def test_a_close_cuts_the_waiting_short(chat: Chat, caplog: pytest.LogCaptureFixture) -> None:
    chat.answers = [(500, "")]
    hook = Webhook(chat.address, "slack", first_wait_seconds=60.0)
    hook.send("a")
    while not chat.seen:
        time.sleep(0.005)
    hook.close()
    assert [record.getMessage() for record in caplog.records] == [
        "an alert did not reach monitor.alerts.webhook (HTTP 500); it stands in events.jsonl"
    ]


@pytest.mark.parametrize(
    ("address", "form"),
    [
        ("https://open.feishu.cn/open-apis/bot/v2/hook/x", "feishu"),
        ("https://open.larksuite.com/x", "feishu"),
        ("https://hooks.slack.com/services/x", "slack"),
        ("https://chat.example/x", None),
        ("https://hooks.slack.com.evil.example/x", None),
    ],
)
def test_the_format_by_host(address: str, form: str | None) -> None:
    assert webhook_format(address) == form and webhook_problem(address, insecure=False) is None


@pytest.mark.parametrize(
    "address",
    [
        "hush",
        "https://",
        "file:///hush",
        "https://a:b/hush",
        "https://a/hush hush",
        "https://ä/hush",
        "https://[x/hush",
        "",
    ],
)
def test_no_address(address: str) -> None:
    assert webhook_problem(address, insecure=True) == "found what is no address (not shown), expected https://HOST/..."


def test_plain_http_only_to_this_machine_or_when_allowed() -> None:
    for host in ("localhost", "127.0.0.1", "127.8.8.8", "[::1]"):
        assert webhook_problem(f"http://{host}:80/x", insecure=False) is None
    assert webhook_problem("http://10.0.0.1/x", insecure=True) is None
    assert "found http, expected https" in str(webhook_problem("http://10.0.0.1/x", insecure=False))
