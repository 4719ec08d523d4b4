"""2:4 weights on the sparse tensor cores of NVIDIA GPUs, through mma.sp: the project's own kernel, no vendor library.

Takes a ``PackedWeight`` and gives the fragment layout of ``sparsecomp.pack.fragments``. Triton is imported on first
use, never with this module. Knows nothing of nn, plan or prune.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sparsecomp.backends.cuda import missing_cuda, missing_triton, too_old
from sparsecomp.backends.registry import Backend, Kernel, Request
from sparsecomp.errors import BackendError
from sparsecomp.pack.format import PackedWeight
from sparsecomp.pack.fragments import fragments_why_not, from_fragments, to_fragments


class GluonBackend(Backend):
    """cp.async, ldmatrix and mma.sp in one Gluon kernel, for 2:4 with fp16 or bf16 weights of any shape.

    Proven by executing its PTX on the CPU, not yet certified on a GPU: it is the last of the sparse GPU backends in
    the order of preference, and meant to be named. On sm_90 mma.sp runs but is expected to lose to dense products.
    """

    name = "gluon"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 and Triton 3.6, or newer, else the reason why not."""
        return missing_cuda() or missing_triton()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = fragments_why_not(request.pattern, request.weight_dtype, request.shape)
        return reason or self.missing() or too_old(request.device)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Fragments int32 [R/16, C/32, 128] and metadata int32 [R/64, C/64, 128], on the device of ``packed``.

        R and C are the sides rounded up to 64. Raises BackendError for a weight that ``supports`` refuses.
        """
        reason = fragments_why_not(packed.pattern, packed.values.dtype, packed.shape)
        if reason is not None:
            raise BackendError(f"the gluon backend {reason}")
        return Kernel(self.name, to_fragments(packed), packed.pattern, packed.shape, packed.dtype)

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
        fragments, metadata = kernel.tensors
        y: Tensor = _kernels().sparse_mma_linear(x, fragments, metadata, bias, kernel.shape[0], activation)
        return y


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.sparse_mma")
