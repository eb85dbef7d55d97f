"""Storage of checkpoints: a local folder or S3, and the lock that excludes a second run."""
