"""What tests of alerts share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.monitor.chat import Chat


@pytest.fixture
def chat() -> Iterator[Chat]:
    server = Chat()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.let_go.set()
    server.shutdown()
    thread.join(10)
    server.server_close()
