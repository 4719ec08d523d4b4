"""A model with sparse layers <-> one file. Must not know kernels or backends."""
