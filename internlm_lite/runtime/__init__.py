"""Where this process runs: rank, device, log."""
