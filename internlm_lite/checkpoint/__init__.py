"""Checkpoints: format, commit protocol, save and load."""
