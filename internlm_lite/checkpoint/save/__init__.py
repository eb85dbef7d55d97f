"""Writing a checkpoint beside training: plan, staging, write, commit."""
