"""Where checkpoints lie: a local folder or S3, and the lock that keeps a second run out."""
