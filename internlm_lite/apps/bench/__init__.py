"""Benchmarks: our parts against what a user would otherwise pick, as ratios measured in one run."""
