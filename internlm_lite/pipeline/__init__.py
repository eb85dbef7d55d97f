"""Pipeline parallelism: which rank has which layers, and running micro-batches through them."""
