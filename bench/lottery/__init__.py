"""Sparse training from scratch on Fashion-MNIST: rules of masks, lottery tickets, and the tangent kernel of both."""
