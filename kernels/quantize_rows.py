"""Activations -> int8 with one scale for each row, on the GPU, just before the int8 product (Triton).

Takes and gives plain tensors on torch's current stream. Imports triton, so it is loaded on first use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomp.kernels import launching

_BLOCK, _WARPS = 1024, 4
_UNIT = 8
CHUNK = 16
"""Rows of integers are padded with zeros to whole copies of this many bytes."""

_LARGEST = tl.constexpr(127.0)
_TINY = tl.constexpr(2.0**-126)


@triton.jit(do_not_specialize=["units", "stride_units", "chunks"], do_not_specialize_on_alignment=["scales"])
def quantize_rows_kernel(x, integers, scales, units, stride_units, chunks, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    # Sizes come in units (8 elements where rows are aligned to 16 bytes, 16 integers), so that the compiler sees which
    # addresses are multiples of 16 bytes. The second pass over the row finds it in the caches.
    row = tl.program_id(0).to(tl.int64)
    columns, width = units * UNIT, chunks * 16
    x_row = x + row * stride_units * UNIT
    largest = tl.zeros([BLOCK], tl.float32)
    strange = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        magnitude = tl.abs(tl.load(x_row + column, mask=column // UNIT < units, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, magnitude)
        strange = tl.where(magnitude < float("inf"), strange, 1)
    # below the smallest normal number a scale would lose the digits it is meant to keep
    scale = tl.maximum(tl.div_rn(tl.max(largest, 0), _LARGEST), _TINY)
    inverse = tl.div_rn(1.0, scale)
    # no integer stands for infinity or NaN: all outputs of such a row become NaN
    tl.store(scales + row, tl.where(tl.max(strange, 0) > 0, float("nan"), scale))
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(x_row + column, mask=column // UNIT < units, other=0.0).to(tl.float32) * inverse
        nearest = tl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [value], tl.int32, True, 1)
        nearest = tl.minimum(tl.maximum(nearest, -127), 127)
        tl.store(integers + row * width + column, nearest.to(tl.int8), mask=column // 16 < chunks)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 [rows, columns rounded up to 16] and fp32 scales [rows] of ``x`` [rows, columns] in fp16, bf16 or fp32.

    Symmetric, scale = max |x| / 127 of the row, integers rounded to nearest even, so that no element moves by more than
    about scale / 2. A row with an infinity or a NaN has the scale NaN. ``quantize_rows_slowly`` gives the same.
    """
    rows, columns = x.shape
    if columns > 1 and x.stride(1) != 1:
        x = x.contiguous()
    chunks = -(-columns // CHUNK)
    integers = torch.empty(rows, chunks * CHUNK, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows == 0:
        return integers, scales
    aligned = columns % _UNIT == 0 and x.stride(0) % _UNIT == 0 and x.data_ptr() % 16 == 0
    unit = _UNIT if aligned else 1
    arguments = (x, integers, scales, columns // unit, x.stride(0) // unit, chunks)
    launching.launch(quantize_rows_kernel, arguments, {"UNIT": unit, "BLOCK": _BLOCK}, (rows,), _WARPS)
    return integers, scales


def quantize_rows_slowly(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``quantize_rows`` in torch, on any device, without the padding."""
    wide = x.to(torch.float32)
    largest = wide.abs().amax(dim=1) if x.shape[1] else wide.new_zeros(x.shape[0])
    scales = (largest / 127).clamp_min(2.0**-126)
    integers = (wide * (1 / scales)[:, None]).round().clamp(-127, 127)
    integers = torch.where(torch.isfinite(integers), integers, 0.0).to(torch.int8)
    return integers, torch.where(torch.isfinite(wide).all(dim=1), scales, torch.nan)
