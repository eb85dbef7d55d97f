"""A training run: building it, the loop, control, reports, checkpoints, failures."""
