"""What holds on a GPU: bodies that run on every device, on fake CUDA tensors, or (marked `gpu`) on a GPU alone."""
