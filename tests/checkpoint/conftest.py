"""Checkpoint tests flush files thousands of times: they run in memory where there is a memory file system."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_MEMORY = Path("/dev/shm")


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of this test's own."""
    if not os.access(_MEMORY, os.W_OK):
        yield tmp_path_factory.mktemp("checkpoint")
        return
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        yield Path(folder)
