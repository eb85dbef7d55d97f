"""Reads the files of a run and shows them as an HTML page."""
