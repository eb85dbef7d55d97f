"""Hybrid ZeRO-1 optimizer: buckets, reduction, norm, loss scaling, curves."""
