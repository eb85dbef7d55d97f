"""What a run wrote, read again and shown as a page."""
