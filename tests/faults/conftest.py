"""Faults are injected into files in memory where there is a memory file system: thousands of them are flushed."""

from __future__ import annotations

from tests.checkpoint.conftest import tmp_path

__all__ = ["tmp_path"]
