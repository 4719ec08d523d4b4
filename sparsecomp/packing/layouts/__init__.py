"""Canonical packed weights <-> the orders in which sparse tensor cores read them. Pure functions on tensors."""
