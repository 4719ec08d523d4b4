"""What pruning costs a real model in quality, method by method."""
