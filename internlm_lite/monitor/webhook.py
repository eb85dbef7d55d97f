"""Sends alerts to a chat: one POST each, from a thread. The address is a secret and is never shown.

feishu   {"msg_type": "text", "content": {"text": ...}}, answered by {"code": 0}
slack    {"text": ...}, also understood by Mattermost and others
"""

from __future__ import annotations

import http.client
import json
import logging
import queue
import ssl
import threading
import urllib.error
import urllib.request
from contextlib import suppress
from email.message import Message
from typing import IO
from urllib.parse import urlsplit

from internlm_lite.config.paths import ChatFormat, is_loopback

logger = logging.getLogger("internlm_lite")

TIMEOUT_SECONDS = 10.0
ATTEMPTS = 4
FIRST_WAIT_SECONDS = 1.0
"""Wait before the second attempt; doubled before each further one."""
CAPACITY = 100
"""Most messages in the queue."""
CLOSE_SECONDS = 5.0
_ANSWER_BYTES = 65536
_TEMPORARY = frozenset({408, 425, 429})


class Webhook:
    """Sends texts in order, in a thread. Texts that cannot be sent are dropped; the first of a series is logged."""

    def __init__(
        self,
        address: str,
        form: ChatFormat,
        timeout_seconds: float = TIMEOUT_SECONDS,
        first_wait_seconds: float = FIRST_WAIT_SECONDS,
    ) -> None:
        """`address`: https://..., or http where the config allows it; checked in config/cross.py."""
        self._address, self._form = address, form
        self._timeout_seconds, self._first_wait_seconds = timeout_seconds, first_wait_seconds
        handlers: list[urllib.request.BaseHandler] = [
            urllib.request.HTTPSHandler(context=ssl.create_default_context()),
            _NoRedirect(),
        ]
        if is_loopback(urlsplit(address).hostname):
            handlers.append(urllib.request.ProxyHandler({}))
        self._opener = urllib.request.build_opener(*handlers)
        self._queue: queue.Queue[str | None] = queue.Queue(CAPACITY)
        self._closing = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._work, name="webhook", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return "Webhook(...)"

    def send(self, text: str) -> None:
        """Queue a text and return at once; it is dropped when the queue is full."""
        try:
            self._queue.put_nowait(text)
        except queue.Full:
            self._report_failure("too many messages wait")

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Try once more to send the queued texts, for at most `seconds`; then log how many were not sent."""
        self._closing.set()
        with suppress(queue.Full):  # with a full queue the thread is awake anyway
            self._queue.put_nowait(None)
        self._thread.join(seconds)
        with self._queue.mutex:
            left = self._queue.unfinished_tasks - self._queue.queue.count(None)
        if left:
            logger.warning("alerts not sent to monitor.alerts.webhook: %d; they are in events.jsonl", left)

    def _work(self) -> None:
        while not (self._closing.is_set() and self._queue.empty()):
            try:
                text = self._queue.get(timeout=1.0)
            except queue.Empty:
                continue
            if text is not None:
                self._deliver(text)
            self._queue.task_done()

    def _deliver(self, text: str) -> None:
        wait = self._first_wait_seconds
        for attempt in range(1, ATTEMPTS + 1):
            problem, again = self._post(text)
            if not problem:
                self._failing = False
                return
            if not again or attempt == ATTEMPTS or self._closing.is_set():
                break
            self._closing.wait(wait)
            wait *= 2
        self._report_failure(problem)

    def _report_failure(self, problem: str) -> None:
        if not self._failing:
            self._failing = True
            logger.warning("cannot send an alert to monitor.alerts.webhook (%s); it is in events.jsonl", problem)

    def _post(self, text: str) -> tuple[str, bool]:
        """What went wrong (empty: nothing) and whether to try again. The text contains no part of the address."""
        request = urllib.request.Request(
            self._address,
            data=json.dumps(message(text, self._form)).encode(),
            headers={"Content-Type": "application/json; charset=utf-8"},
            method="POST",
        )
        try:
            with self._opener.open(request, timeout=self._timeout_seconds) as answer:
                return self._refusal(answer.read(_ANSWER_BYTES)), True
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}", error.code >= 500 or error.code in _TEMPORARY
        except (OSError, ValueError, http.client.HTTPException) as error:
            return _kind(getattr(error, "reason", error)), True

    def _refusal(self, answer: bytes) -> str:
        """Feishu refuses with HTTP 200 and a code in the body."""
        if self._form != "feishu":
            return ""
        try:
            code = json.loads(answer).get("code", 0)
        except (ValueError, AttributeError):
            return "no Feishu answer"
        return f"Feishu code {code}" if code else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Redirects would send the message to another address; they are reported as HTTP 30x."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


def message(text: str, form: ChatFormat) -> dict[str, object]:
    """The body of the request."""
    return {"msg_type": "text", "content": {"text": text}} if form == "feishu" else {"text": text}


def _kind(error: object) -> str:
    """The type of an error and the system's message, without its arguments, which may contain the address."""
    words = getattr(error, "strerror", None)
    return f"{type(error).__name__}: {words}" if words and not isinstance(error, ssl.SSLError) else type(error).__name__
