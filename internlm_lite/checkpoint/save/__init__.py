"""Saving a checkpoint while training continues: plan, staging, write, commit."""
