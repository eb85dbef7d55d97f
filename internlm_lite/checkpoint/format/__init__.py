"""What a checkpoint looks like: boxes, tensor files, manifest, and which checkpoints there are."""
