"""Block-sparse weights on NVIDIA GPUs: dense tensor-core products of the kept blocks only.

Takes a ``PackedWeight`` and gives compressed block rows for ``sparsecomp.kernels.block_sparse``. Triton is imported on
first use, never with this module. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_triton, too_old, with_unit_columns
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight
from sparsecomp.patterns import Block, Pattern
from sparsecomp.patterns.numbers import FLOAT_DTYPES

SIDES = (16, 32, 64, 128)


class TritonBlockBackend(Backend):
    """One Triton kernel for blocks whose sides are 16, 32, 64 or 128, any shape, in fp16, bf16 or fp32."""

    name = "triton_block"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 and Triton 3.6, or newer, else the reason why not."""
        return missing_cuda() or missing_triton()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every shape and batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        return _unfit(request.pattern, request.values_dtype) or self.missing() or too_old(request.device)

    def nearest(self, request: Request) -> bool:
        """True off the CPU for blocks."""
        return torch.device(request.device).type != "cpu" and isinstance(request.pattern, Block)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Values [kept, rows, columns] as packed, and int32: starts [block rows + 1], then block columns [kept].

        Raises BackendError for a weight that ``supports`` refuses.
        """
        reason = _unfit(packed.pattern, packed.values.dtype)
        if reason is not None:
            raise BackendError(f"the triton_block backend {reason}")
        assert isinstance(packed.pattern, Block)
        kept = unpack_positions(packed.metadata, packed.pattern.grid(*packed.shape)[1], 1).to(torch.bool)
        starts = torch.zeros(kept.shape[0] + 1, dtype=torch.int32, device=packed.device)
        starts[1:] = kept.sum(dim=1).cumsum(0)
        columns = kept.nonzero()[:, 1].to(torch.int32)
        tensors = (packed.values.contiguous(), torch.cat([starts, columns]))
        return self._kernel(tensors, packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        values, starts, columns = _parts(kernel)
        assert isinstance(kernel.pattern, Block)
        kept = torch.zeros(kernel.pattern.grid(*kernel.shape), dtype=torch.uint8, device=values.device)
        rows = torch.repeat_interleave(torch.arange(kept.shape[0], device=values.device), starts.diff())
        kept[rows, columns.to(torch.int64)] = 1
        return PackedWeight(values, pack_positions(kept, 1), kernel.pattern, kernel.shape)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream; the first call of a tile and a block size compiles it."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        arguments = with_unit_columns(x), *_parts(kernel), bias, kernel.shape[0]
        with torch.cuda.device(x.get_device()):
            y: Tensor = _kernels().block_linear(*arguments, activation)
        return y


def _parts(kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Values, starts and block columns."""
    values, index = kernel.tensors
    starts, columns = index.tensor_split([index.numel() - values.shape[0]])
    return values, starts, columns


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.block_sparse")


def _unfit(pattern: Pattern, dtype: torch.dtype) -> str | None:
    if not isinstance(pattern, Block):
        return f"has no kernel for {pattern}; blocks only"
    if pattern.rows not in SIDES or pattern.cols not in SIDES:
        return f"has no kernel for blocks of {pattern.rows}x{pattern.cols}; sides of 16, 32, 64 or 128 only"
    if dtype not in FLOAT_DTYPES:
        return f"has no kernel for {dtype}; torch.float16, torch.bfloat16 and torch.float32 only"
    return None
