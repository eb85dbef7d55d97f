"""Metrics of a run and the sinks that write, show or send them."""
