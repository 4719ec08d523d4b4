"""y = act(x W^T + bias) for a V:N:M weight: of x only the 4 of every M columns that V rows share are multiplied.

The 2:4 weight of those columns is decompressed in registers, for dense tensor-core products. Takes plain tensors and
launches on torch's current stream. Imports triton, so it is loaded on first use; knows nothing of packing or backends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sparsecomp.kernels.activation import activate
from sparsecomp.kernels.nm_decompress import GROUP_BLOCK, Tile, expand
from sparsecomp.kernels.triton_compat import REGISTERS_SUFFICE, narrow_tiles_for


def choose_tile(v: int, batch: int, narrow: bool = False) -> Tile:
    """The tile for V and a batch, ``columns`` kept ones a step; its rows divide V.

    Small enough that nothing spills on sm_80 to sm_90. ``narrow`` as ``narrow_tiles`` says.
    """
    rows = v & -v  # the largest power of two that divides V
    if batch <= 16:
        return Tile(min(rows, 32), 16, 64 if REGISTERS_SUFFICE else 32, 4, 4)
    if batch <= 32 or narrow:
        return Tile(min(rows, 64), 32, 64, 4, 3)
    return Tile(rows, 64, 32, 4, 3) if rows < 64 else Tile(min(rows, 128), 64, 64, 8, 3)


@triton.jit
def _columns(kept, step, groups, M: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    # of x, for the kept columns of a step; from the padding of the groups on they lie beyond the end of x
    place = step * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    return place // 4 * M + tl.load(kept + place, mask=place < groups * 4, other=0).to(tl.int32)


@triton.jit
def vnm_linear_kernel(
    x,
    values,
    positions,
    kept,
    bias,
    y,
    batch,
    out_features,
    in_features,
    group_blocks,
    stride_x,
    stride_y,
    V: tl.constexpr,
    M: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_BATCH: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    GROUPS: tl.constexpr = TILE_COLUMNS // 4
    tiles_out = tl.cdiv(out_features, TILE_OUT)
    first_row = (tl.program_id(0) % tiles_out).to(tl.int64) * TILE_OUT
    row = first_row + tl.arange(0, TILE_OUT)
    item = (tl.program_id(0) // tiles_out).to(tl.int64) * TILE_BATCH + tl.arange(0, TILE_BATCH)
    row_in, item_in = row < out_features, item < batch
    # planes are whole blocks of 8 groups, which the compiler sees here and turns into wide loads
    groups = group_blocks * 8
    value_rows = values + row[:, None] * 2 * groups
    position_rows = positions + row[:, None] * 2 * (group_blocks * 2)
    kept += first_row // V * groups * 4
    # lanes of a warp read neighbouring kept columns of a row of x, which lie within M / 4 times as many
    x_rows = x + item[:, None] * stride_x
    # elements of x are too narrow for cp.async: they are loaded a step ahead of their product, their places two
    column = _columns(kept, 0, groups, M, TILE_COLUMNS)
    x_next = tl.load(x_rows + column[None, :], mask=item_in[:, None] & (column[None, :] < in_features), other=0.0)
    column = _columns(kept, 1, groups, M, TILE_COLUMNS)
    accumulator = tl.zeros((TILE_BATCH, TILE_OUT), tl.float32)
    for step in range(tl.cdiv(groups, GROUPS)):
        x_tile = x_next
        x_next = tl.load(x_rows + column[None, :], mask=item_in[:, None] & (column[None, :] < in_features), other=0.0)
        column = _columns(kept, step + 2, groups, M, TILE_COLUMNS)
        group = step * GROUPS + tl.arange(0, GROUPS)[None, :]
        inside = row_in[:, None] & (group < groups)
        slot_values = ()
        slot_positions = ()
        for s in tl.static_range(2):
            value = tl.load(value_rows + (s * groups + group), mask=inside, other=0)
            byte = tl.load(position_rows + (s * group_blocks * 2 + group // 4), mask=inside, other=0)
            slot_values = slot_values + (value,)  # noqa: RUF005 - Triton has no unpacking
            slot_positions = slot_positions + ((byte.to(tl.int32) >> (group % 4 * 2)) & 3,)  # noqa: RUF005
        weight = expand(slot_values, slot_positions, 0, 1, 2, 4)
        accumulator = tl.dot(x_tile, tl.trans(weight), accumulator, input_precision="ieee")
    if HAS_BIAS:
        accumulator += tl.load(bias + row, mask=row_in, other=0.0).to(tl.float32)[None, :]
    accumulator = activate(accumulator, ACTIVATION)
    target = y + item[:, None] * stride_y + row[None, :]
    tl.store(target, accumulator.to(y.dtype.element_ty), mask=item_in[:, None] & row_in[None, :])


def vnm_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    kept: torch.Tensor,
    bias: torch.Tensor | None,
    v: int,
    m: int,
    out_features: int,
    activation: str = "none",
) -> torch.Tensor:
    """y [batch, out] = act(x W^T + bias) in the dtype of ``x``, fp16 or bf16, accumulated in fp32 and rounded once.

    ``x`` [batch, in] with unit column stride; ``values`` [out, 2, G] of its dtype and ``positions`` uint8
    [out, 2, G / 4] are slot planes as those of ``nm_linear`` for 2:4, over the kept columns; ``kept`` uint8
    [ceil(out / V), 4 G]: where in its group of M each kept column lies. G is a multiple of 8, V one of 16.
    """
    batch, in_features = x.shape
    y = torch.empty(batch, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    tile = choose_tile(v, batch, narrow_tiles_for(x))
    grid = (triton.cdiv(out_features, tile.out) * triton.cdiv(batch, tile.batch),)
    vnm_linear_kernel[grid](
        x,
        values,
        positions,
        kept,
        y if bias is None else bias,
        y,
        batch,
        out_features,
        in_features,
        values.shape[2] // GROUP_BLOCK,
        x.stride(0),
        y.stride(0),
        V=v,
        M=m,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        TILE_OUT=tile.out,
        TILE_BATCH=tile.batch,
        TILE_COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
