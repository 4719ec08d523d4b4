"""2:4 weights and activations rounded to fp8 (e4m3) on Hopper's sparse tensor cores: ``cutlass_fp8`` as a backend.

Takes a ``PackedWeight`` of fp16 or bf16 and gives the layout of ``packing.layouts.wgmma`` in fp8 with scales. Compiles
and loads nothing when it is imported. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from sparsecomp.activations import activate
from sparsecomp.backends.base import Backend, Kernel
from sparsecomp.backends.gpu.cuda import missing_cuda
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass.backend import missing_hopper, other_gpu
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.backends.gpu.cutlass.fp8 import FP8, Fp8Weight, fp8_linear
from sparsecomp.errors import BackendError
from sparsecomp.machine.request import Request
from sparsecomp.packing.bits import pack_positions, unpack_positions
from sparsecomp.packing.format import PackedWeight, pack
from sparsecomp.packing.layouts.wgmma import ROWS, padded, tiled, wgmma_why_not
from sparsecomp.patterns import row_nm
from sparsecomp.patterns.numbers import FLOAT

_LARGEST = 448.0  # of e4m3
_TINY = 2.0**-126
_OWN_ROUNDING = "rounds fp16 and bf16 weights to fp8 itself and takes none in int8"


class CutlassFp8Backend(Backend):
    """QGMMA.SP of compute capability 9.0, for 2:4 weights of any shape, with a scale for each row and each token.

    Weights are rounded to e4m3 once, times a power of two, so that fp16 and bf16 hold what the kernel multiplies: the
    layer gives back the rounded weight, exactly, and rounding it again changes nothing. Activations are rounded at
    every call, the largest magnitude of a token becoming 448. Sums, scales, bias and activation are in fp32.
    """

    name = "cutlass_fp8"
    fuses_activations = True
    _per_row: ClassVar[bool] = True

    def by_name_only(self, request: Request) -> str | None:
        """It rounds weights and activations."""
        return f'rounds weights and activations to fp8, so it is taken by name only: backend="{self.name}"'

    def missing(self) -> str | None:
        """None if there is a GPU of compute capability 9.0 and the kernels are compiled or can be, else the reason."""
        return missing_cuda() or missing_hopper() or cutlass_build.why_not(_configs(torch.bfloat16))

    def supports(self, request: Request) -> str | None:
        """None if the kernels run this request, else the reason why not. Every batch size is fine."""
        if torch.device(request.device).type != "cuda":
            return f"runs on cuda, not on {request.device}"
        if request.numbers != FLOAT:
            return _OWN_ROUNDING
        reason = wgmma_why_not(request.pattern, request.dtype, request.shape)
        return reason or self.missing() or other_gpu(request.device) or cutlass_build.why_not(_configs(request.dtype))

    def prepare(self, packed: PackedWeight) -> Kernel:
        """Values float8_e4m3fn [out, C/2], metadata uint8 [C/128, R/64, 1024], and scales fp32 [out] or [1].

        C and R are the sides rounded up to 128 and 64. Raises BackendError for a weight that ``supports`` refuses. On
        a CUDA device this compiles the kernels if they are not in the cache, with a warning.
        """
        reason = _OWN_ROUNDING if packed.numbers != FLOAT else None
        if reason := reason or wgmma_why_not(packed.pattern, packed.values.dtype, packed.shape):
            raise BackendError(f"the {self.name} backend {reason}")
        if packed.device.type == "cuda":
            cutlass_build.libraries(_configs(packed.dtype))
        values, octets = padded(packed)
        magnitude = values.abs().float()
        largest = magnitude.amax(1) if self._per_row else magnitude.flatten().amax(0, keepdim=True)
        scales = _power_of_two(largest / _LARGEST)
        narrow = (values.float() / scales.unsqueeze(1)).to(FP8)
        return self._kernel((narrow, tiled(octets, 1), scales), packed)

    def restore(self, kernel: Kernel) -> PackedWeight:
        """The canonical form of the rounded weight, in the layer's dtype, exactly what the kernel multiplies."""
        narrow, metadata, scales = kernel.tensors
        nm = row_nm(kernel.pattern)
        assert nm is not None
        out, columns = kernel.shape
        steps, tiles = metadata.shape[:2]
        octets = metadata.view(steps, tiles, ROWS, 16).permute(1, 2, 0, 3).reshape(tiles * ROWS, steps * 16)
        positions = unpack_positions(octets[: out : nm.mask_rows], nm.slots(columns), nm.index_bits)
        values = (narrow.float() * scales.unsqueeze(1)).to(kernel.dtype)[:, : nm.slots(columns)].contiguous()
        kept = PackedWeight(values, pack_positions(positions, nm.index_bits), kernel.pattern, kernel.shape)
        # what rounding made zero has no place of its own in the canonical form
        return pack(kept.unpack(), kernel.pattern)

    def run(self, kernel: Kernel, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [batch, out] on torch's current stream, after five small kernels that round x."""
        return self.run_activated(kernel, x, bias, "none")

    def run_activated(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str) -> Tensor:
        """``run`` with the activation in fp32, before the rounding."""
        values, metadata, weight_scales = kernel.tensors
        weight = Fp8Weight(values, metadata, weight_scales, kernel.shape)
        narrow, scales = rounded(x, self._per_row)
        return fp8_linear(narrow, scales, weight, bias, output=kernel.dtype, activation=activation)

    def run_slowly(self, kernel: Kernel, x: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
        """What ``run_activated`` computes, in float64 and on any device: the twin that tests compare with."""
        narrow, scales = rounded(x, self._per_row)
        wide = narrow.double() * scales.double().unsqueeze(1)
        y = functional.linear(wide, self.dense(kernel).double(), None if bias is None else bias.double())
        return activate(y, activation).to(kernel.dtype)


class CutlassFp8TensorBackend(CutlassFp8Backend):
    """The same with one scale for the whole weight and one for all of x: less exact, one factor to read."""

    name = "cutlass_fp8_tensor"
    _per_row = False


def rounded(x: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """``x`` [tokens, in] in float8_e4m3fn, and fp32 scales [tokens] or [1]: x is about values * scales.

    The largest magnitude of a token, or of all, becomes 448. A token with an infinity or a NaN becomes NaN.
    """
    if x.shape[0] == 0:
        return x.to(FP8), x.new_ones(0 if per_row else 1, dtype=torch.float32)
    dimensions = 1 if per_row else (0, 1)
    largest = torch.linalg.vector_norm(x, torch.inf, dimensions, dtype=torch.float32).view(-1)
    scales = (largest / _LARGEST).clamp_min_(_TINY)  # zeros stay zeros
    return (x / scales.unsqueeze(1)).to(FP8), scales


def _power_of_two(least: Tensor) -> Tensor:
    """The smallest powers of two that are not below ``least``, and normal fp32 numbers."""
    mantissa, exponent = torch.frexp(least)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_min(-126)
    return torch.ldexp(torch.ones_like(least), exponent)


def _configs(output: torch.dtype) -> tuple[Config, ...]:
    return configs("float8_e4m3fn", str(output).removeprefix("torch."))
