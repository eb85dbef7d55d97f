"""Conversions flush files often: they run in memory where there is a memory file system. The S3 server is the one of
the checkpoint tests."""

from tests.checkpoint.conftest import s3_folder, s3_process, s3_server, tmp_path

__all__ = ["s3_folder", "s3_process", "s3_server", "tmp_path"]
