"""Conversions flush files often: they run in memory where there is a memory file system."""

from tests.checkpoint.conftest import tmp_path

__all__ = ["tmp_path"]
