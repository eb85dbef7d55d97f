"""Loading a checkpoint into any mesh."""
