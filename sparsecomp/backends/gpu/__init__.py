"""Adapters of the kernels for NVIDIA GPUs. Nothing of CUDA or Triton is imported before it is used."""
