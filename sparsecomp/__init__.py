"""sparsecomp: a hardware-aware semi-structured sparsity compiler."""
