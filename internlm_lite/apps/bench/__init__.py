"""Benchmarks: our parts against the usual alternatives, as ratios measured in one run."""
