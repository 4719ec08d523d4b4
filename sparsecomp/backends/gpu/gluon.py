"""Weights on the sparse tensor cores of NVIDIA GPUs, through mma.sp: the project's own kernel, no vendor library.

Takes a ``PackedWeight`` and gives the fragment layout of ``packing.layouts.fragments``. Triton is imported on first
use, never with this module. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import ClassVar

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_gluon, not_the_path, too_old
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack, scales_of
from sparsecomp.packing.layouts.fragments import fragments_why_not, from_fragments, to_fragments
from sparsecomp.patterns import NM, Pattern, row_nm
from sparsecomp.patterns.numbers import FLOAT


class GluonBackend(Backend):
    """cp.async, ldmatrix and mma.sp in one Gluon kernel, for 2:4 with fp16 or bf16 weights of any shape.

    Proven by executing its PTX on the CPU, not yet certified on a GPU: it is the last of the sparse GPU backends in
    the order of preference, and meant to be named. On sm_90 mma.sp runs but is expected to lose to dense products.
    """

    name = "gluon"
    fuses_activations = True
    _weight_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float16, torch.bfloat16)

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 and Triton 3.6, or newer, else the reason why not."""
        return missing_cuda() or missing_gluon()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = self._unfit(request.pattern, request.values_dtype, request.shape)
        return reason or self.missing() or too_old(request.device)

    def by_name_only(self, request: Request) -> str | None:
        """Another of the project's backends is the way to the sparse tensor cores of other architectures."""
        return not_the_path(self.name, request.device)

    def _unfit(self, pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
        return fragments_why_not(pattern, dtype, shape, self._weight_dtypes)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Fragments int32 and metadata int32 as ``to_fragments`` gives them, on the device of ``packed``.

        Raises BackendError for a weight that ``supports`` refuses.
        """
        if reason := self._unfit(packed.pattern, packed.values.dtype, packed.shape):
            raise BackendError(f"the {self.name} backend {reason}")
        return self._kernel((*fragments(packed), *scales_of(packed)), packed)

    def prepare_dense(self, weight: Tensor, pattern: Pattern) -> Kernel:
        """What ``prepare`` makes of ``pack(weight, pattern)``; on a GPU in one pass, without the canonical form.

        Raises PatternError for a weight that ``pack`` refuses, as it does, and BackendError as ``prepare`` does.
        """
        shape = (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (0, 0)
        if not (cuda.on_gpu(weight) and isinstance(pattern, NM) and pattern == NM(pattern.n, pattern.m)):
            return self.prepare(pack(weight, pattern))
        if reason := self._unfit(pattern, weight.dtype, shape):
            raise BackendError(f"the {self.name} backend {reason}")
        fragments, metadata, broken = _packing().pack_dense(weight.detach())
        if bool(broken.any()):
            pack(weight, pattern)  # names the group
        return Kernel(self.name, (fragments, metadata), pattern, shape, weight.dtype, FLOAT)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        fragments, metadata = kernel.tensors
        return from_fragments(fragments, metadata, kernel.pattern, kernel.shape, kernel.dtype)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream. Rows of ``x`` not aligned to 16 bytes are copied once.

        The first call for about as many rows compiles a few tiles (about 1 s each) and measures them; in a CUDA graph
        that is being captured nothing can be measured, so run it once before.
        """
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        fragments, metadata, *scales = kernel.tensors
        arguments = (x, fragments, metadata, bias, kernel.shape[0], activation)
        y: Tensor = _kernels().sparse_mma_linear(*arguments, scales=scales[0] if scales else None)
        return y


def fragments(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """``to_fragments``, by a kernel in one pass where the weight is on a GPU."""
    nm = row_nm(packed.pattern)
    if nm is None or not cuda.on_gpu(packed.values):
        return to_fragments(packed)
    words, metadata = _packing().pack_fragments(packed.values, packed.metadata, nm, packed.shape[1])
    return words, metadata


@lru_cache(maxsize=1)
def _packing() -> ModuleType:
    return import_module("sparsecomp.kernels.pack_fragments")


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.sparse_mma")
