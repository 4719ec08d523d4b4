"""The mma.sp kernel for other elements: int8 with activations rounded to int8, and fp32 rounded to tf32.

Both compute less exactly than the layer's dtype allows. Knows nothing of nn, planning and pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.backends.base import Kernel, numbers_why_not
from sparsecomp.backends.gpu.gluon import GluonBackend
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.fragments import from_fragments
from sparsecomp.packing.quantize import quantize
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import INT8

_WITHOUT_SCALES = 'has no kernel for {} weights without row scales; quantise them with quantize="int8"'


class GluonTf32Backend(GluonBackend):
    """The same kernel for fp32 weights in pattern 1:2, which is what the tensor cores take of fp32; 2:4 is not 1:2.

    Weights and x are rounded to tf32 (to nearest, 10 bits of mantissa) in registers and summed in fp32; the weight that
    is kept, and given back, is the fp32 one.
    """

    name = "gluon_tf32"
    _weight_dtypes = (torch.float32,)

    def by_name_only(self, request: Request) -> str | None:
        """It rounds more than fp32 does."""
        return 'rounds fp32 to the 10 bits of tf32, so it is taken by name only: backend="gluon_tf32"'


class GluonInt8Backend(GluonBackend):
    """The same kernel for 2:4 int8 weights with row scales and for x rounded to int8, with a scale for each token.

    x, the output and the bias stay in the layer's dtype. A token's scale is its largest magnitude / 127 (dynamic,
    symmetric); sums of int8 products are exact, and scales, bias and activation are applied in fp32.
    """

    name = "gluon_int8"
    _weight_dtypes = (torch.int8,)

    def by_name_only(self, request: Request) -> str | None:
        """It rounds activations."""
        return 'rounds activations to int8, token by token, so it is taken by name only: backend="gluon_int8"'

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not: int8 weights with row scales only."""
        if not request.numbers.has_scales:
            return _WITHOUT_SCALES.format(request.dtype)
        return numbers_why_not(request.numbers, (INT8,)) or super().supports(request)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Fragments and metadata int32 as ``to_fragments`` gives them, and the scales fp32 [out].

        Raises BackendError for a weight that ``supports`` refuses.
        """
        if not packed.numbers.has_scales:
            raise BackendError(f"the {self.name} backend {_WITHOUT_SCALES.format(packed.values.dtype)}")
        if reason := numbers_why_not(packed.numbers, (INT8,)):
            raise BackendError(f"the {self.name} backend {reason}")
        return super().prepare(packed)

    def prepare_dense(self, weight: Tensor, pattern: Pattern) -> Kernel:
        """What ``prepare`` makes of the packed weight, quantised row by row."""
        return self.prepare(quantize(pack(weight, pattern)))

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form with its scales, byte for byte the one that ``prepare`` was given."""
        fragments, metadata, scales = kernel.tensors
        integers = from_fragments(fragments, metadata, kernel.pattern, kernel.shape, torch.int8)
        parts = integers.values, integers.metadata, scales
        return PackedWeight.of(parts, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)
