"""The end of a split product: partial sums added in order, then scales, bias, activation and rounding (Triton).

Takes plain tensors on torch's current stream. Imports triton, so it is loaded on first use. No atomic operation is
used, so that equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomp.kernels import launching
from sparsecomp.kernels.sparse_mma_epilogue import finish

_BLOCK, _WARPS = 256, 2


@triton.jit(
    do_not_specialize=["splits", "out_units", "tokens"],
    do_not_specialize_on_alignment=["bias", "row_scales", "token_scales"],
)
def add_splits_kernel(
    partial,
    bias,
    row_scales,
    token_scales,
    y,
    splits,
    out_units,
    tokens,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SCALED: tl.constexpr = partial.dtype.element_ty == tl.int32
    CODE: tl.constexpr = finish(ACTIVATION, y.dtype.element_ty, SCALED)
    out = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = out // OUT_UNIT < out_units
    token = tl.program_id(1).to(tl.int64)
    place = token * out_units * OUT_UNIT + out
    stride = tl.full([], tokens, tl.int64) * out_units * OUT_UNIT
    total = tl.zeros([BLOCK], partial.dtype.element_ty)
    added = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + out, mask=inside, other=0.0).to(tl.float32)
    if not SCALED:
        total = added
    for split in range(splits):
        total += tl.load(partial + split * stride + place, mask=inside, other=0)
    if SCALED:
        row_scale = tl.load(row_scales + out, mask=inside, other=0.0)
        token_scale = tl.load(token_scales + token) + tl.zeros([BLOCK], tl.float32)
        operands = [total, row_scale, token_scale, added]
        result = tl.inline_asm_elementwise(CODE[0], CODE[1], operands, y.dtype.element_ty, True, 2)
    else:
        result = tl.inline_asm_elementwise(CODE[0], CODE[1], [total], y.dtype.element_ty, True, 2)
    tl.store(y + place, result, mask=inside)


def add_splits(
    partial: torch.Tensor,
    bias: torch.Tensor | None,
    scales: torch.Tensor | None,
    token_scales: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
) -> None:
    """Write activation(bias + partial[0] + partial[1] + ...) to ``y`` [tokens, out], summed in fp32 in that order.

    ``partial`` fp32 [splits, tokens, out]; or int32, and then its sum is multiplied by ``scales`` fp32 [out] and
    ``token_scales`` fp32 [tokens] before the bias is added.
    """
    splits, tokens, out_features = partial.shape
    unit = 8 if out_features % 8 == 0 else 1
    arguments = (
        partial,
        y if bias is None else bias,
        y if scales is None else scales,
        y if token_scales is None else token_scales,
        y,
        splits,
        out_features // unit,
        tokens,
    )
    constants = {"HAS_BIAS": bias is not None, "ACTIVATION": activation, "OUT_UNIT": unit, "BLOCK": _BLOCK}
    launching.launch(add_splits_kernel, arguments, constants, (-(-out_features // _BLOCK), tokens), _WARPS)
