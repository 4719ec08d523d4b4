"""PrunedWeight -> PackedWeight and back, exactly. Knows nothing of kernels."""

from sparsecomp.pack.format import PackedWeight, pack
from sparsecomp.pack.quantize import quantize

__all__ = ["PackedWeight", "pack", "quantize"]
