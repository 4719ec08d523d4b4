"""2:4 weights on the sparse tensor cores of Hopper, through CUTLASS's wgmma.sp collective.

The kernels are built with the package, or compiled on first use; importing this compiles and loads nothing. Takes a
``PackedWeight`` and gives the layout of ``packing.layouts.wgmma``. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.layouts.wgmma import from_wgmma, to_wgmma, wgmma_why_not

CAPABILITY = (9, 0)


class CutlassBackend(Backend):
    """wgmma.sp with tensor copies, for 2:4 with fp16 or bf16 weights of any shape, on compute capability 9.0 alone.

    Its machine code and layouts are checked without a GPU, its products are not yet certified on one: it comes after
    the other sparse GPU backends in the order of preference and is meant to be named.
    """

    name = "cutlass"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 9.0 and the kernels are compiled or can be, else the reason."""
        return missing_cuda() or missing_hopper() or cutlass_build.why_not(_configs(torch.bfloat16))

    def supports(self, request: Request) -> str | None:
        """None if the kernels run this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = wgmma_why_not(request.pattern, request.values_dtype, request.shape)
        return reason or self.missing() or other_gpu(request.device) or cutlass_build.why_not(_configs(request.dtype))

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Values [out, C/2] and metadata uint8 [C/128, R/64, 1024], on the device of ``packed``.

        C and R are the sides rounded up to 128 and 64. On a CUDA device this compiles the kernels of the dtype if they
        are not in the cache, with a warning: minutes, once on a machine. Raises BackendError for a weight that
        ``supports`` refuses.
        """
        reason = wgmma_why_not(packed.pattern, packed.values.dtype, packed.shape)
        if reason is not None:
            raise BackendError(f"the cutlass backend {reason}")
        if packed.device.type == "cuda":
            cutlass_build.libraries(_configs(packed.dtype))
        return self._kernel(to_wgmma(packed), packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        values, metadata = kernel.tensors
        return from_wgmma(values, metadata, kernel.pattern, kernel.shape, kernel.dtype)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream.

        Rows of ``x`` not aligned to 16 bytes are copied once, and so is a y whose rows are not. The first call for
        about as many rows measures a few kernels; in a CUDA graph that is being captured nothing can be measured, so
        run it once before.
        """
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        values, metadata = kernel.tensors
        return cutlass_library.product(x, values, metadata, bias, kernel.shape[0], _configs(kernel.dtype), activation)


def missing_hopper() -> str | None:
    """None if one of the CUDA devices has compute capability 9.0, else the reason why the first one does not do."""
    reasons = [other_gpu(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    return None if None in reasons else reasons[0]


def other_gpu(device: str) -> str | None:
    """None if that CUDA device has compute capability 9.0, else the reason why not."""
    capability = torch.cuda.get_device_capability(device)
    if capability == CAPABILITY:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {capability[0]}.{capability[1]}; wgmma is of 9.0 (Hopper) alone"


def _configs(dtype: torch.dtype) -> tuple[Config, ...]:
    name = str(dtype).removeprefix("torch.")
    return configs(name, name)
