"""The GPU check: correctness, hangs, and speed on a new GPU."""
