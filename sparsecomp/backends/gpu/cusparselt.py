"""2:4 weights on NVIDIA GPUs through cuSPARSELt, as torch ships it: the vendor's baseline.

Takes a ``PackedWeight`` and gives cuSPARSELt's compressed tensor, which is opaque, differs between architectures and is
never stored. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_triton, too_old
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.patterns import Pattern, row_nm

DTYPES = (torch.float16, torch.bfloat16)
WEIGHT_MULTIPLE = 16
BATCH_MULTIPLE = 8
_RESTORE_COLUMNS = 4096
_ALIGNMENT = 16  # bytes


class CusparseltBackend(Backend):
    """torch's binding of cuSPARSELt, for 2:4 with fp16 or bf16 weights whose sides are multiples of 16."""

    name = "cusparselt"
    of_a_vendor = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 or newer and torch has cuSPARSELt, else the reason."""
        reason = missing_cuda()
        if reason is None and not torch.backends.cusparselt.is_available():
            return f"torch {torch.__version__} is built without cuSPARSELt; install one of PyTorch's own CUDA wheels"
        return reason

    def supports(self, request: Request) -> str | None:
        """None if cuSPARSELt runs this request, else the reason why not. The shape rules are those of torch.sparse."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        reason = _unfit(request.pattern, request.values_dtype, request.shape)
        return reason or self.missing() or too_old(request.device)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """cuSPARSELt's compressed tensor, the only copy kept; it is decompressed once here and compared, bit for bit.

        Raises BackendError for a weight that ``supports`` refuses, and if the comparison fails.
        """
        reason = _unfit(packed.pattern, packed.values.dtype, packed.shape)
        if reason is not None:
            raise BackendError(f"the cusparselt backend {reason}")
        dense = _unpacked(packed)
        with torch.cuda.device(dense.get_device()):
            compressed = torch._cslt_compress(dense)
        kernel = self._kernel((compressed,), packed)
        if not torch.equal(self._dense(kernel), dense):
            raise BackendError("cuSPARSELt does not give this weight back exactly; use another backend for this layer")
        return kernel

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, from the product with the identity.

        Each output is one weight times 1.0 plus zeros, accumulated in fp32, hence exact in fp16 and bf16; ``prepare``
        has compared it for this very weight.
        """
        return pack(self._dense(kernel), kernel.pattern)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream.

        ``x`` is copied once if its batch is no multiple of 8, its rows have gaps or it starts between 16-byte words.
        """
        batch = x.shape[0]
        if batch == 0:
            return x.new_empty(0, kernel.shape[0])
        # the library is told of no stride: it takes a transposed operand to be a contiguous [batch, in]
        rows = whole_rows(x)
        bias = None if bias is None else bias.contiguous()
        with torch.cuda.device(x.get_device()):
            y = torch._cslt_sparse_mm(kernel.tensors[0], rows.t(), bias=bias, transpose_result=True)
        return y[:batch]

    def _dense(self, kernel: Kernel) -> Tensor:
        out, columns = kernel.shape
        dense = torch.empty(out, columns, dtype=kernel.dtype, device=kernel.tensors[0].device)
        for start in range(0, columns, _RESTORE_COLUMNS):
            stop = min(start + _RESTORE_COLUMNS, columns)
            identity = torch.zeros(stop - start, columns, dtype=dense.dtype, device=dense.device)
            identity[:, start:stop].fill_diagonal_(1)
            dense[:, start:stop] = self.run(kernel, identity, None).t()
        return dense


def _unpacked(packed: PackedWeight) -> Tensor:
    """``packed.unpack()``, by one kernel where Triton is there."""
    nm = row_nm(packed.pattern)
    if nm is None or not cuda.on_gpu(packed.values) or missing_triton() is not None:
        return packed.unpack()
    unpack = import_module("sparsecomp.kernels.pack_planes").unpack
    dense: Tensor = unpack(packed.values, packed.metadata, nm, packed.shape[1])
    return dense


def whole_rows(x: Tensor) -> Tensor:
    """``x`` [batch, in] contiguous, at a multiple of 16 bytes, its batch padded with zeros to a multiple of 8.

    A copy if any of these was not so, else ``x`` itself.
    """
    missing = -x.shape[0] % BATCH_MULTIPLE
    rows = functional.pad(x, (0, 0, 0, missing)) if missing else x.contiguous()
    return rows.clone() if rows.data_ptr() % _ALIGNMENT else rows


def _unfit(pattern: Pattern, dtype: torch.dtype, shape: tuple[int, int]) -> str | None:
    nm = row_nm(pattern)
    if nm is None or (nm.n, nm.m) != (2, 4):
        return f"has no kernel for {pattern}; 2:4 only"
    if dtype not in DTYPES:
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    if min(shape) == 0 or any(side % WEIGHT_MULTIPLE for side in shape):
        return f"takes weights whose sides are multiples of {WEIGHT_MULTIPLE}, not {shape[0]}x{shape[1]}"
    return None
