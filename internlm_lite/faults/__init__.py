"""What happens to a run from outside."""
