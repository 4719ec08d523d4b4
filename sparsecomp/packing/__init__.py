"""PrunedWeight -> PackedWeight and back, exactly. Knows nothing of kernels."""

from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.quantize import quantize

__all__ = ["PackedWeight", "pack", "quantize"]
