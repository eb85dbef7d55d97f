"""Watchdog, signals, anomalies."""
