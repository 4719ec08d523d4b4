"""Our own product as an engine: SparseLinear with the compiled kernels. Knows nothing of clocks."""

from __future__ import annotations

from torch import Tensor

import sparsecomp as sc
from sparsecomp.backends.registry import backends
from sparsecomp.engines.base import DTYPES, Engine, Loaded, Modules, Operands
from sparsecomp.machine.request import Request
from sparsecomp.packing.quantize import in_numbers
from sparsecomp.patterns.numbers import parse_weights


class SparseEngine(Engine):
    """SparseLinear pinned to the compiled CPU kernels, so that it never falls back to dense."""

    openmp = True

    def __init__(self, label: str) -> None:
        """An engine for weights that fit a pattern, such as "2:4"; "2:4+int8" rounds them to int8 with row scales."""
        self.name = f"sparsecomp {label}"
        self.label = label
        pattern, self.numbers = parse_weights(label)
        self.pattern = str(pattern)

    def missing(self, dtype: str) -> str | None:
        """Why the compiled kernels cannot run this dtype, if they cannot."""
        cpu = backends()["cpu"]
        return cpu.missing() or cpu.supports(
            Request(sc.parse_pattern(self.pattern or ""), (64, 64), DTYPES[dtype], "cpu", 1, self.numbers)
        )

    def load(self, operands: Operands) -> Loaded:
        """One SparseLinear for each copy."""
        dtype, bias = DTYPES[operands.dtype], operands.bias
        packed = (self._packed(weight.to(dtype)) for weight in operands.weights)
        return Modules([sc.SparseLinear.from_packed(each, bias.to(dtype), backend="cpu") for each in packed], dtype)

    def effective(self, weight: Tensor) -> Tensor:
        """The weight itself, or what its integers and scales stand for."""
        return self._packed(weight).unpack() if self.numbers.has_scales else weight

    def _packed(self, weight: Tensor) -> sc.PackedWeight:
        assert self.pattern is not None
        return in_numbers(sc.pack(weight, self.pattern), self.numbers)
