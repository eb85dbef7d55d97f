"""From tokenised files to batches."""
