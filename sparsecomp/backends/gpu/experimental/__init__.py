"""Backends for GPUs that nobody gets without naming them: no hardware has decided for them."""
