"""Hybrid ZeRO-1 optimizer: buckets and their collectives, skipping of steps, update rules, schedules."""
