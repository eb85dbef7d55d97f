"""Reading a checkpoint into any layout."""
