"""V:N:M weights on NVIDIA GPUs: the columns that V rows share, gathered from x, and dense products of those only.

Takes a ``PackedWeight`` and gives the layout of ``sparsecomp.kernels.vnm_gather``. Triton is imported on first use,
never with this module. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_triton, too_old, with_unit_columns
from sparsecomp.backends.gpu.triton import TritonBackend
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.layouts.vnm import from_gathered, to_gathered
from sparsecomp.patterns import NM, VNM, VNM_KEPT_COLUMNS, Pattern

DTYPES = (torch.float16, torch.bfloat16)
ROWS_MULTIPLE = 16
"""V must be a multiple of it: the rows of the smallest tensor-core product, which all read the same columns."""


class TritonVnmBackend(Backend):
    """One Triton kernel for V:N:M whose V is a multiple of 16, any shape, in fp16 or bf16."""

    name = "triton_vnm"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 and Triton 3.6, or newer, else the reason why not."""
        return missing_cuda() or missing_triton()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every shape and batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        return _unfit(request.pattern, request.values_dtype) or self.missing() or too_old(request.device)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Values [out, 2, G] and uint8 bytes: places [ceil(out / V), 4 G], then positions [out, 2, G / 4].

        Values and positions are the planes of ``TritonBackend`` for the 2:4 weight that ``to_gathered`` gives, and the
        places are padded with zeros to the same number G of groups. Raises BackendError for a weight that ``supports``
        refuses.
        """
        if reason := _unfit(packed.pattern, packed.values.dtype):
            raise BackendError(f"the {self.name} backend {reason}")
        places, gathered = to_gathered(packed)
        values, positions = TritonBackend().prepare(gathered).tensors
        kept = torch.nn.functional.pad(places, (0, VNM_KEPT_COLUMNS * values.shape[2] - places.shape[1]))
        octets = torch.cat([kept.flatten(), positions.flatten()])
        return self._kernel((values, octets), packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        values, kept, positions = _parts(kernel)
        pattern = _vnm(kernel)
        columns = VNM_KEPT_COLUMNS * pattern.row_pattern.groups(kernel.shape[1])
        planes = Kernel("triton", (values, positions), _INNER, (kernel.shape[0], columns), kernel.dtype, kernel.numbers)
        return from_gathered(kept[:, :columns], TritonBackend().restore(planes), pattern, kernel.shape)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream; the first call of a tile and a pattern compiles it (under 1 s)."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        values, kept, positions = _parts(kernel)
        pattern = _vnm(kernel)
        arguments = with_unit_columns(x), values, positions, kept, bias, pattern.v, pattern.m, kernel.shape[0]
        with torch.cuda.device(x.get_device()):
            y: Tensor = _kernels().vnm_linear(*arguments, activation)
        return y


_INNER = NM(2, VNM_KEPT_COLUMNS)


def _parts(kernel: Kernel) -> tuple[Tensor, Tensor, Tensor]:
    """Values, places of the kept columns, and positions."""
    values, octets = kernel.tensors
    out, _, groups = values.shape
    tiles = -(-out // _vnm(kernel).v)
    kept, positions = octets.tensor_split([tiles * VNM_KEPT_COLUMNS * groups])
    return values, kept.view(tiles, VNM_KEPT_COLUMNS * groups), positions.view(out, 2, groups // 4)


def _vnm(kernel: Kernel) -> VNM:
    assert isinstance(kernel.pattern, VNM)
    return kernel.pattern


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.vnm_gather")


def _unfit(pattern: Pattern, dtype: torch.dtype) -> str | None:
    if not isinstance(pattern, VNM):
        return f"has no kernel for {pattern}; V:N:M patterns only"
    if pattern.v % ROWS_MULTIPLE:
        return f"has no kernel for {pattern}; V must be a multiple of {ROWS_MULTIPLE}, such as 64"
    if dtype not in DTYPES:
        return f"has no kernel for {dtype}; torch.float16 and torch.bfloat16 only"
    return None
