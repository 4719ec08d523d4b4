"""2:4 weights on Hopper by wgmma.sp with the weight in registers: the project's own kernel, behind a flag.

Takes a ``PackedWeight`` and gives the fragment layout of ``packing.layouts.fragments``. Triton is imported on first
use, never with this module. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_gluon, not_the_path
from sparsecomp.backends.gpu.cutlass.backend import missing_hopper, other_gpu
from sparsecomp.backends.gpu.gluon import fragments
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.layouts.fragments import fragments_why_not, from_fragments
from sparsecomp.patterns import Pattern

FLAG = "SPARSECOMP_EXPERIMENTAL"
_DTYPES = (torch.float16, torch.bfloat16)


class GluonWgmmaBackend(Backend):
    """One Gluon kernel around wgmma.sp, for 2:4 with fp16 or bf16 weights of any shape, on compute capability 9.0.

    Off unless ``SPARSECOMP_EXPERIMENTAL`` names it: its PTX was executed on the CPU, and no GPU has run it.
    """

    name = "gluon_wgmma"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if the flag is set and there is a GPU of compute capability 9.0 and Triton 3.6, else the reason."""
        if self.name not in os.environ.get(FLAG, "").split(","):
            return f"is an experiment that no GPU has certified; set {FLAG}={self.name} to try it"
        return missing_cuda() or missing_hopper() or missing_gluon()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = _unfit(request.pattern, request.values_dtype, request.shape)
        return reason or self.missing() or other_gpu(request.device)

    def by_name_only(self, request: Request) -> str | None:
        """``cutlass`` is the way to the sparse tensor cores of Hopper."""
        return not_the_path(self.name, request.device)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Fragments int32 [R/16, C/32, 128] and metadata int32 [R/64, C/64, 128], R and C rounded up to 64.

        Raises BackendError for a weight that ``supports`` refuses.
        """
        if reason := _unfit(packed.pattern, packed.values.dtype, packed.shape):
            raise BackendError(f"the {self.name} backend {reason}")
        return self._kernel(fragments(packed), packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        fragments, metadata = kernel.tensors
        return from_fragments(fragments, metadata, kernel.pattern, kernel.shape, kernel.dtype)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream. Rows of ``x`` not aligned to 16 bytes are copied once."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        fragments, metadata = kernel.tensors
        y: Tensor = _kernels().sparse_wgmma_linear(x, fragments, metadata, bias, kernel.shape[0], activation)
        return y


def _unfit(pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    if dtype not in _DTYPES:
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    return fragments_why_not(pattern, dtype, shape)


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.sparse_wgmma")
