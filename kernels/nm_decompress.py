"""y = act(x W^T + bias) for an N:M weight, decompressed in registers and multiplied by dense tensor-core products.

Takes plain tensors in the slot-plane layout and launches on torch's current stream. Imports triton, so it is loaded on
first use; knows nothing of packing, backends or layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparsecomp.kernels.activation import activate
from sparsecomp.kernels.triton_compat import REGISTERS_SUFFICE
from sparsecomp.patterns import NM

GROUP_BLOCK = 8
"""Planes are padded to whole blocks of this many groups: 16 bytes of 16-bit values, whole bytes of positions."""


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how: ``out`` x ``batch`` outputs, ``columns`` input columns a step."""

    out: int
    batch: int
    columns: int
    warps: int
    stages: int


def plane_bits(nm: NM) -> int:
    """Bits of one position in a plane: the index bits rounded up to 1, 2 or 4, so that no position crosses a byte."""
    return 4 if nm.index_bits == 3 else nm.index_bits


def choose_tile(dtype: torch.dtype, batch: int) -> Tile:
    """The tile for a batch. Small enough that no weight dtype or N:M pattern spills registers on sm_80 to sm_90."""
    if dtype == torch.float32:
        return Tile(32, 16, 32, 4, 2) if batch <= 16 else Tile(64, 32, 16, 4, 2)
    if batch <= 16:
        return Tile(32, 16, 64, 4, 4)
    return Tile(64, 32, 64, 4, 3) if batch <= 32 or not REGISTERS_SUFFICE else Tile(64, 64, 64, 4, 3)


@triton.jit
def expand(values, positions, START: tl.constexpr, STEP: tl.constexpr, N: tl.constexpr, M: tl.constexpr):
    # Columns START, START+STEP, ... of every group, [rows, groups * M / STEP]. Halving by parity lets interleave
    # restore the column order while each thread keeps whole groups: no data crosses threads.
    if STEP == M:
        column = tl.zeros_like(values[0])
        # positions ascend, so slot s can only sit in columns s to s + M - N
        for s in tl.static_range(max(0, START - (M - N)), min(START + 1, N)):
            column = tl.where(positions[s] == START, values[s], column)
        return column
    else:  # noqa: RET505 - only a branch is left out when Triton compiles the other one
        even = expand(values, positions, START, STEP * 2, N, M)
        odd = expand(values, positions, START + STEP, STEP * 2, N, M)
        return tl.interleave(even, odd)


@triton.jit
def nm_linear_kernel(
    x,
    values,
    positions,
    scales,
    bias,
    y,
    batch,
    out_features,
    in_features,
    group_blocks,
    stride_x,
    stride_y,
    N: tl.constexpr,
    M: tl.constexpr,
    BITS: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    PER_BYTE: tl.constexpr = 8 // BITS
    GROUPS: tl.constexpr = TILE_COLUMNS // M
    tiles_out = tl.cdiv(out_features, TILE_OUT)
    tile = tl.program_id(0)
    # 64-bit rows: a row index times a stride passes 2**31 in large layers
    row = (tile % tiles_out).to(tl.int64) * TILE_OUT + tl.arange(0, TILE_OUT)
    item = (tile // tiles_out).to(tl.int64) * TILE_BATCH + tl.arange(0, TILE_BATCH)
    row_in = row < out_features
    item_in = item[:, None] < batch
    x_rows = x + item[:, None] * stride_x
    # planes are whole blocks of 8 groups, which the compiler sees here and turns into 16-byte loads
    groups = group_blocks * 8
    plane_bytes = group_blocks * BITS
    value_rows = values + row[:, None] * N * groups
    position_rows = positions + (row // MASK_ROWS)[:, None] * N * plane_bytes
    accumulator = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
    for step in range(tl.cdiv(in_features, TILE_COLUMNS)):
        group = step * GROUPS + tl.arange(0, GROUPS)[None, :]
        inside = row_in[:, None] & (group < groups)
        slot_values = ()
        slot_positions = ()
        for s in tl.static_range(N):
            value = tl.load(value_rows + (s * groups + group), mask=inside, other=0)
            if HAS_SCALES:
                # every dtype of x holds int8 exactly; the row scale waits for the sum
                value = value.to(tl.float32).to(x.dtype.element_ty)
            byte = tl.load(position_rows + (s * plane_bytes + group // PER_BYTE), mask=inside, other=0)
            shift = (group % PER_BYTE) * BITS
            position = (byte.to(tl.int32) >> shift) & ((1 << BITS) - 1)
            slot_values = slot_values + (value,)  # noqa: RUF005 - Triton has no unpacking
            slot_positions = slot_positions + (position,)  # noqa: RUF005
        weight = expand(slot_values, slot_positions, 0, 1, N, M)
        column = step * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
        x_tile = tl.load(x_rows + column[None, :], mask=item_in & (column[None, :] < in_features), other=0.0)
        # the weight is the right operand: as the left one Triton hands it to wgmma in registers, and either leaves them
        # to be overwritten while they are read or has ptxas put a wait after every product
        accumulator = tl.dot(x_tile, tl.trans(weight), accumulator, input_precision="ieee")
    if HAS_SCALES:
        accumulator *= tl.load(scales + row, mask=row_in, other=0.0)[None, :]
    if HAS_BIAS:
        accumulator += tl.load(bias + row, mask=row_in, other=0.0).to(tl.float32)[None, :]
    accumulator = activate(accumulator, ACTIVATION)
    target = y + item[:, None] * stride_y + row[None, :]
    tl.store(target, accumulator.to(y.dtype.element_ty), mask=item_in & row_in[None, :])


def nm_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    bias: torch.Tensor | None,
    nm: NM,
    out_features: int,
    scales: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """y [batch, out] = act(scales * (x W^T) + bias), accumulated in fp32 and rounded once to the dtype of ``x``.

    ``x`` [batch, in] with unit column stride; ``values`` [out, N, groups] of the dtype of ``x``, or int8 with
    ``scales`` fp32 [out]: plane s holds the s-th kept weight of every group; ``positions`` uint8
    [ceil(out / mask_rows), N, bytes]: in-group positions in the same order, ``plane_bits(nm)`` bits each, least
    significant bit first. fp32 is multiplied in fp32, not in tf32.
    """
    batch, in_features = x.shape
    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = choose_tile(x.dtype, batch)
    grid = (triton.cdiv(out_features, tile.out) * triton.cdiv(batch, tile.batch),)
    nm_linear_kernel[grid](
        x,
        values,
        positions,
        y if scales is None else scales,
        y if bias is None else bias,
        y,
        batch,
        out_features,
        in_features,
        values.shape[2] // GROUP_BLOCK,
        x.stride(0),
        y.stride(0),
        N=nm.n,
        M=nm.m,
        BITS=plane_bits(nm),
        MASK_ROWS=nm.mask_rows,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        TILE_OUT=tile.out,
        TILE_BATCH=tile.batch,
        TILE_COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
