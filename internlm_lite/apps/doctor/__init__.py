"""Gathers environment and hardware of all ranks of a job, compares and diagnoses them."""
