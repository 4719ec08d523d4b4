"""2:4 products in fp8 (e4m3) on Hopper, with a scale for each row or one for all: the same CUTLASS kernels.

A functional surface beside the registry, since the packed format has no fp8: takes a ``PackedWeight`` of any floating
dtype, and x that is in fp8 already. Knows nothing of nn, planning or pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsecomp.activations import require_activation
from sparsecomp.backends.gpu.cuda import missing_cuda
from sparsecomp.backends.gpu.cutlass import build as cutlass_build
from sparsecomp.backends.gpu.cutlass import library as cutlass_library
from sparsecomp.backends.gpu.cutlass.backend import other_gpu
from sparsecomp.backends.gpu.cutlass.config import Config, configs
from sparsecomp.backends.gpu.cutlass.library import Scales
from sparsecomp.errors import BackendError
from sparsecomp.packing.format import PackedWeight
from sparsecomp.packing.layouts.wgmma import padded, tiled, wgmma_why_not

FP8 = torch.float8_e4m3fn
OUTPUTS = (torch.bfloat16, torch.float16)
_LARGEST = 448.0  # of e4m3


@dataclass(frozen=True, eq=False)
class Fp8Weight:
    """A 2:4 weight [out, in] in fp8: the kernels' layout of ``packing.layouts.wgmma``, and what its values are times.

    ``values`` float8_e4m3fn [out, C/2], ``metadata`` uint8 [C/128, R/64, 1024], ``scales`` fp32 [out] or [1].
    """

    values: Tensor
    metadata: Tensor
    scales: Tensor
    shape: tuple[int, int]


def scaled(x: Tensor, per_row: bool = True) -> tuple[Tensor, Tensor]:
    """``x`` [rows, columns] in float8_e4m3fn, and fp32 scales [rows] or [1]: x is about values * scales.

    The largest magnitude of a row, or of all, becomes 448, the largest of e4m3.
    """
    magnitude = x.abs().float()
    largest = magnitude.amax(1, keepdim=True) if x.shape[1] else magnitude.new_zeros(x.shape[0], 1)
    if not per_row:
        largest = largest.amax(0, keepdim=True) if x.shape[0] else largest.new_zeros(1, 1)
    # zeros stay zeros, whatever they are divided by
    scales = torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))
    # a quotient may be rounded up past the largest, which fp8 would turn into NaN
    return (x.float() / scales).clamp(-_LARGEST, _LARGEST).to(FP8), scales.flatten()


def prepare_fp8(packed: PackedWeight, per_row: bool = True) -> Fp8Weight:
    """A 2:4 weight of fp32, fp16 or bf16, rounded to fp8 with a scale for each row or one for all, on its device.

    Raises BackendError for another pattern, and for quantised weights.
    """
    kind = torch.float16 if packed.values.dtype == torch.float32 else packed.values.dtype
    if reason := wgmma_why_not(packed.pattern, kind, packed.shape):
        raise BackendError(f"the fp8 product {reason}")
    values, octets = padded(packed)
    narrow, scales = scaled(values, per_row)
    return Fp8Weight(narrow, tiled(octets, 1), scales, packed.shape)


def fp8_why_not(device: str = "cuda", output: torch.dtype = torch.bfloat16, fast: bool = False) -> str | None:
    """None if that device runs ``fp8_linear``, its kernels being compiled or compilable here, else the reason."""
    return missing_cuda() or other_gpu(device) or cutlass_build.why_not(_configs(output, fast))


def fp8_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Fp8Weight,
    bias: Tensor | None = None,
    *,
    output: torch.dtype = torch.bfloat16,
    activation: str = "none",
    fast: bool = False,
) -> Tensor:
    """y [tokens, out] = activation((x * x_scales) (W * scales)^T + bias) in ``output``, bf16 or fp16.

    ``x`` float8_e4m3fn [tokens, in], ``x_scales`` fp32 [tokens] or [1], ``bias`` [out] in ``output``. Rows of x
    that do not start at multiples of 16 bytes are copied once. ``fast`` leaves the sums in the tensor cores, which keep
    about 14 bits of them; otherwise they are added in fp32 after each step. Compiles the kernels on first use.
    Raises BackendError for other operands, and with the reason where it cannot run.
    """
    require_activation(activation)
    if output not in OUTPUTS:
        raise BackendError(f"fp8_linear gives torch.bfloat16 or torch.float16, not {output}; convert y afterwards")
    out, columns = weight.shape
    operands = ((x, FP8, ((x.shape[0], columns),)), (x_scales, torch.float32, ((x.shape[0],), (1,))))
    for tensor, dtype, shapes in (*operands, *(() if bias is None else ((bias, output, ((out,),)),))):
        if tensor.dtype != dtype or tuple(tensor.shape) not in shapes or tensor.device != weight.values.device:
            allowed = " or ".join(str(shape) for shape in shapes)
            raise BackendError(
                f"fp8_linear got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}; "
                f"this operand is {allowed} of {dtype} on {weight.values.device}"
            )
    scales = Scales(weight.scales, x_scales.contiguous())
    shift = None if bias is None else bias.contiguous()
    options = _configs(output, fast)
    return cutlass_library.product(x, weight.values, weight.metadata, shift, out, options, activation, scales)


def _configs(output: torch.dtype, fast: bool) -> tuple[Config, ...]:
    return configs("float8_e4m3fn", str(output).removeprefix("torch."), fast)
