"""Hybrid ZeRO-1 optimizer: buckets and their collectives, the decision to skip a step, update rules, schedules."""
