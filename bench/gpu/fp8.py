"""The fp8 products that the sweep compares: cuBLAS through torch, and our CUTLASS kernels on 2:4 weights.

Weights and x come in bf16 and are rounded to e4m3 beforehand: the products alone are timed.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from bench.gpu.cases import Case
from bench.gpu.engine import Call, GpuEngine
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass import fp8 as cutlass_fp8
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.packing.format import pack

_MULTIPLE = 16


class CublasFp8(GpuEngine):
    """torch._scaled_mm with one scale for each operand, which is cuBLAS; summed in the tensor cores or in fp32."""

    sparse = False

    def __init__(self, fast: bool) -> None:
        """``fast`` leaves the sums in the tensor cores."""
        self._fast = fast
        self.name = "cublas fp8 fast" if fast else "cublas fp8"

    def refuses(self, case: Case, dtype: torch.dtype) -> str | None:
        """cuBLAS asks for sides that are multiples of 16."""
        if case.out % _MULTIPLE or case.columns % _MULTIPLE:
            return f"takes sides that are multiples of {_MULTIPLE}, not {case.out}x{case.columns}"
        return None

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """x is padded to 16 rows once, where it has fewer."""
        tokens = x.shape[0]
        padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % _MULTIPLE))
        (narrow, scale), (rows, x_scale) = (cutlass_fp8.scaled(each, per_row=False) for each in (weight, padded))
        scales = x_scale.reshape(()), scale.reshape(())
        fast, columns = self._fast, narrow.t()

        def call() -> Tensor:
            y: Tensor = torch._scaled_mm(rows, columns, *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)
            return y[:tokens]

        return call


class OursFp8(GpuEngine):
    """``fp8_linear`` with one scale for each operand."""

    sparse = True

    def __init__(self, fast: bool) -> None:
        """``fast`` leaves the sums in the tensor cores."""
        self._fast = fast
        self.name = "sparsecomp cutlass fp8 fast" if fast else "sparsecomp cutlass fp8"

    def missing(self) -> str | None:
        """Why the kernels cannot run here; they are not compiled in the middle of a sweep."""
        return cutlass_fp8.fp8_why_not(fast=self._fast) or not_compiled(self._configs())

    def prepare(self, weight: Tensor, x: Tensor) -> Call:
        """The layout; the first call measures some kernels."""
        packed = cutlass_fp8.prepare_fp8(pack(weight, "2:4"), per_row=False)
        rows, scale = cutlass_fp8.scaled(x, per_row=False)
        return lambda: cutlass_fp8.fp8_linear(rows, scale, packed, fast=self._fast)

    def note(self, case: Case) -> str:
        """The kernel that was found fastest."""
        product = (torch.cuda.current_device(), self._configs(), case.out, case.columns)
        key = cutlass_library.tuning_key(*product, case.tokens)
        return str(import_module("sparsecomp.kernels.sparse_mma_tuning").known(key))

    def _configs(self) -> tuple[Config, ...]:
        return configs("float8_e4m3fn", "bfloat16", self._fast)


def not_compiled(needed: tuple[Config, ...]) -> str | None:
    """None if these libraries are there, else the reason why they are left out of a sweep."""
    if cutlass_build.compiled(needed):
        return None
    return "its libraries were not compiled before; python -m sparsecomp.backends.gpu.cutlass.build does it"


def fp8_engines() -> list[GpuEngine]:
    """Baselines first."""
    return [CublasFp8(True), CublasFp8(False), OursFp8(True), OursFp8(False)]
