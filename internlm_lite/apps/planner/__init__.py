"""Memory, traffic and compute cost of a layout, computed without starting a run."""
