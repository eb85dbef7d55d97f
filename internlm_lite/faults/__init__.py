"""Failures of ranks: signals, hangs, lost ranks, and their records."""
