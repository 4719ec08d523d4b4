"""What modules and tensors of torch hold beside their values. Knows nothing of sparsity."""
