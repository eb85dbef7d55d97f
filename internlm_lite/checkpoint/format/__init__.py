"""What a checkpoint looks like: regions, tensor files, manifest, and which checkpoints there are."""
