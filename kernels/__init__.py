"""Device kernels in Triton. They take plain tensors and know nothing of the package but its patterns."""
