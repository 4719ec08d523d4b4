"""N:M weights on NVIDIA GPUs: decompressed in registers and multiplied by dense tensor-core products.

Takes a ``PackedWeight`` and gives the slot-plane layout of ``sparsecomp.kernels.nm_decompress``. Triton is imported on
first use, never with this module. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.backends.base import Backend, Kernel, numbers_why_not
from sparsecomp.backends.gpu import cuda
from sparsecomp.backends.gpu.cuda import missing_cuda, missing_triton, too_old, with_unit_columns
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight, pack, scales_of
from sparsecomp.patterns import NM, Block, Pattern, row_nm
from sparsecomp.patterns.numbers import FLOAT, FLOAT_DTYPES, INT8

_DTYPE_NAMES = "torch.float16, torch.bfloat16 and torch.float32"


class TritonBackend(Backend):
    """One Triton kernel for every N:M and V:N:M pattern, any shape, with fp16, bf16, fp32 or int8 weights."""

    name = "triton"
    fuses_activations = True

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 8.0 and Triton 3.6, or newer, else the reason why not."""
        return missing_cuda() or missing_triton()

    def supports(self, request: Request) -> str | None:
        """None if the kernel runs this request, else the reason why not. Every shape and batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        if row_nm(request.pattern) is None:
            return f"has no kernel for {request.pattern}; N:M and V:N:M patterns only"
        if request.dtype not in FLOAT_DTYPES:
            return f"has no kernel for {request.dtype}; {_DTYPE_NAMES} only"
        if reason := numbers_why_not(request.numbers, (FLOAT, INT8)):
            return reason
        return self.missing() or too_old(request.device)

    def nearest(self, request: Request) -> bool:
        """True off the CPU for all but blocks: no other backend takes every N:M and V:N:M pattern, dtype and shape."""
        return torch.device(request.device).type != "cpu" and not isinstance(request.pattern, Block)

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Slot planes: values [out, N, G] and positions uint8 [ceil(out / mask_rows), N, G * plane bits / 8].

        G is the group count rounded up to 8; plane s holds the s-th kept weight of every group, so that threads read
        neighbouring groups in whole 16-byte words whatever N is. The scales fp32 [out] of an int8 weight follow. On a
        GPU one kernel does it. Raises BackendError for another pattern or dtype.
        """
        nm = _nm(packed.pattern)
        _require_floating(packed.dtype)
        make = _packing().pack_planes if cuda.on_gpu(packed.values) else _planes
        tensors = (*make(packed.values, packed.metadata, nm, packed.shape[1]), *scales_of(packed))
        return self._kernel(tensors, packed)

    def prepare_dense(self, weight: Tensor, pattern: Pattern) -> Kernel:
        """What ``prepare`` makes of ``pack(weight, pattern)``; on a GPU in one pass, without the canonical form.

        Raises PatternError for a weight that ``pack`` refuses, as it does, and BackendError as ``prepare`` does.
        """
        alone = isinstance(pattern, NM) and pattern == NM(pattern.n, pattern.m)
        if not (alone and weight.ndim == 2 and cuda.on_gpu(weight)):
            return self.prepare(pack(weight, pattern))
        _require_floating(weight.dtype)
        planes, positions, broken = _packing().pack_planes_dense(weight.detach(), _nm(pattern))
        if bool(broken.any()):
            pack(weight, pattern)  # names the group
        return Kernel(self.name, (planes, positions), pattern, (weight.shape[0], weight.shape[1]), weight.dtype, FLOAT)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form, byte for byte the one that ``prepare`` was given."""
        kernels = _kernels()
        nm = _nm(kernel.pattern)
        planes, metadata, *scales = kernel.tensors
        out, columns = kernel.shape
        groups = nm.groups(columns)
        tiles = metadata.shape[0]
        values = planes[:, :, :groups].transpose(1, 2).reshape(out, groups * nm.n)
        rows = unpack_positions(metadata.flatten(0, 1), planes.shape[2], kernels.plane_bits(nm))
        positions = rows.view(tiles, nm.n, planes.shape[2])[:, :, :groups].transpose(1, 2).reshape(tiles, groups * nm.n)
        parts = values, pack_positions(positions, nm.index_bits), *scales
        return PackedWeight.of(parts, kernel.pattern, kernel.shape, kernel.dtype, kernel.numbers)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream; the first call of a tile and a pattern compiles it (under 1 s)."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        values, positions, *scales = kernel.tensors
        arguments = with_unit_columns(x), values, positions, bias, _nm(kernel.pattern), kernel.shape[0]
        with torch.cuda.device(x.get_device()):
            y: Tensor = _kernels().nm_linear(*arguments, scales=scales[0] if scales else None, activation=activation)
        return y


def _planes(values: Tensor, metadata: Tensor, nm: NM, columns: int) -> tuple[Tensor, Tensor]:
    """The slow twin of ``pack_planes``: planes and positions of a canonical weight [out, columns], by torch."""
    kernels = _kernels()
    out, groups = values.shape[0], nm.groups(columns)
    padding = (0, -groups % kernels.GROUP_BLOCK)
    planes = functional.pad(values.view(out, groups, nm.n).transpose(1, 2), padding).contiguous()
    positions = unpack_positions(metadata, nm.slots(columns), nm.index_bits)
    tiles = positions.shape[0]
    padded = functional.pad(positions.view(tiles, groups, nm.n).transpose(1, 2), padding)
    octets = pack_positions(padded.reshape(tiles * nm.n, padded.shape[2]), kernels.plane_bits(nm))
    return planes, octets.view(tiles, nm.n, octets.shape[1])


def _require_floating(dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise BackendError(f"the triton backend has no kernel for {dtype}; {_DTYPE_NAMES} only")


@lru_cache(maxsize=1)
def _packing() -> ModuleType:
    return import_module("sparsecomp.kernels.pack_planes")


@lru_cache(maxsize=1)
def _kernels() -> ModuleType:
    return import_module("sparsecomp.kernels.nm_decompress")


def _nm(pattern: Pattern) -> NM:
    nm = row_nm(pattern)
    if nm is None:
        raise BackendError(f"the triton backend has no kernel for {pattern}; N:M and V:N:M patterns only")
    return nm
