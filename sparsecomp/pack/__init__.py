"""PrunedWeight -> PackedWeight and back, exactly. Knows nothing of kernels."""

from sparsecomp.pack.format import PackedWeight, pack

__all__ = ["PackedWeight", "pack"]
