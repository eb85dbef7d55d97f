"""Checkpoints: format, commit protocol, saving, loading, storage."""
