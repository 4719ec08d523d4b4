"""One thin adapter per family of kernels, behind ``registry``. Knows nothing of nn, planning or pruning."""
