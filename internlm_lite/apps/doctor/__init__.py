"""What the ranks of a job run on: gathered from all of them, compared, diagnosed."""
