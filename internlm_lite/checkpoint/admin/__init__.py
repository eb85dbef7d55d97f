"""Looking at checkpoints from outside a run: list, verify, prune."""
