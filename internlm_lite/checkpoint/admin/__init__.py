"""Tools for checkpoints outside a run: list, verify, prune."""
