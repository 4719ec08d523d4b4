"""2:4 weights on Ampere and Ada through torch's own CUTLASS kernel, the one behind its semi-structured tensors.

Takes a ``PackedWeight`` and gives its values and the sm_80 metadata of ``packing.layouts.sm80``: a fallback where
torch has no cuSPARSELt. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda
from sparsecomp.backends.gpu.cusparselt import whole_rows
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import pack_positions
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.layouts.sm80 import from_sm80_metadata, to_sm80_metadata
from sparsecomp.patterns import NM, Pattern

DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64  # of a tile


class SemiStructuredBackend(Backend):
    """torch._sparse_semi_structured_mm, for 2:4 with fp16 or bf16 weights in whole tiles, on sm_80, 86, 87 and 89.

    torch refuses it on every other architecture.
    """

    name = "semi_structured"
    of_a_vendor = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.x and torch has the kernel, else the reason why not."""
        reason = missing_cuda()
        if reason is not None:
            return reason
        if not hasattr(torch, "_sparse_semi_structured_addmm"):
            return f"torch {torch.__version__} has no CUTLASS kernel for semi-structured weights; use another torch"
        reasons = [_other_gpu(f"cuda:{index}") for index in range(torch.cuda.device_count())]
        return None if None in reasons else reasons[0]

    def supports(self, request: Request) -> str | None:
        """None if torch runs this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = _unfit(request.pattern, request.values_dtype, request.shape)
        return reason or self.missing() or _other_gpu(request.device)

    def by_name_only(self, request: Request) -> str | None:
        """It stands in where torch has no cuSPARSELt."""
        if not torch.backends.cusparselt.is_available():
            return None
        return f'stands in where torch has no cuSPARSELt, which is here: backend="{self.name}"'

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Values [out, in/2] as packed, and metadata int16 [out, in/16] in sm_80 order.

        Raises BackendError for a weight that ``supports`` refuses.
        """
        if reason := _unfit(packed.pattern, packed.values.dtype, packed.shape):
            raise BackendError(f"the {self.name} backend {reason}")
        tensors = packed.values.contiguous(), to_sm80_metadata(packed)
        return self._kernel(tensors, packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        values, metadata = kernel.tensors
        positions = from_sm80_metadata(metadata).flatten(1)
        return PackedWeight(values, pack_positions(positions, 2), kernel.pattern, kernel.shape)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream; x is copied as ``whole_rows`` says."""
        batch = x.shape[0]
        if batch == 0:
            return x.new_empty(0, kernel.shape[0])
        values, metadata = kernel.tensors
        operands = values, metadata, whole_rows(x).t()
        with torch.cuda.device(x.get_device()):
            if bias is None:
                y = torch._sparse_semi_structured_mm(*operands)
            else:
                y = torch._sparse_semi_structured_addmm(bias.contiguous(), *operands)
        # torch gives [out, batch], in one order of memory or the other
        return y.t()[:batch].contiguous()


def _other_gpu(device: str) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if major == 8:
        return None
    name = torch.cuda.get_device_name(device)
    return f"{name} has compute capability {major}.{minor}; torch has this kernel for 8.x alone"


def _unfit(pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    if pattern != NM(2, 4):
        return f"has no kernel for {pattern}; 2:4 only"
    if dtype not in DTYPES:
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    if min(shape) == 0 or shape[0] % _ROWS or shape[1] % _COLUMNS:
        return f"takes weights in multiples of {_ROWS}x{_COLUMNS}, not {shape[0]}x{shape[1]}"
    return None
