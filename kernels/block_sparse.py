"""y = act(x W^T + bias) for a weight of which whole blocks are kept: dense tensor-core products of those blocks only.

Takes plain tensors in compressed block rows and launches on torch's current stream. Imports triton, so it is loaded on
first use; knows nothing of packing, backends or layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sparsecomp.kernels.activation import activate
from sparsecomp.kernels.triton_compat import narrow_tiles_for


@dataclass(frozen=True)
class Tile:
    """What one program computes, and how: ``tokens`` x one block row of outputs, ``columns`` of a block a step."""

    tokens: int
    columns: int
    warps: int
    stages: int


def choose_tile(dtype: torch.dtype, rows: int, columns: int, tokens: int, aligned: bool, narrow: bool = False) -> Tile:
    """The tile for blocks of ``rows`` x ``columns``. Small enough that nothing spills on sm_80 to sm_90.

    ``aligned`` tells whether rows of x are read 16 bytes at a time; element by element takes more registers.
    ``narrow`` as ``narrow_tiles`` says.
    """
    if dtype == torch.float32:
        # blocks of 128 rows spill with 4 warps on sm_86 and newer, with 32 columns a step on sm_86 and 89 (Triton 3.9),
        # and with 32 tokens on sm_90 (Triton 3.6)
        few = tokens <= 16 or (rows == 128 and narrow)
        return Tile(16 if few else 32, 16 if rows == 128 else min(columns, 32), 8 if rows == 128 else 4, 2)
    if tokens <= 16:
        return Tile(16, min(columns, 128 if aligned else 64), 4, 4)
    if narrow:
        return Tile(32, min(columns, 64 if aligned else 32), 8 if rows == 128 else 4, 3)
    if tokens <= 64 or not aligned:
        return Tile(64, min(columns, 64), 4 if aligned else 8, 3)
    # 64 rows in 4 warps spill on sm_86 and 89 (Triton 3.9)
    return Tile(128, min(columns, 64), 8 if rows >= 64 else 4, 3)


@triton.jit
def block_linear_kernel(
    x,
    values,
    starts,
    block_columns,
    bias,
    y,
    tokens,
    out_features,
    in_features,
    stride_x,
    stride_y,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    # neighbouring programs multiply the same tokens, which then stay in L2
    blocks_down = tl.cdiv(out_features, ROWS)
    block_row = tl.program_id(0) % blocks_down
    token = (tl.program_id(0) // blocks_down).to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    row = block_row * ROWS + tl.arange(0, ROWS)
    x_rows = x + token[:, None] * stride_x
    within = tl.arange(0, ROWS)[None, :] * COLUMNS + tl.arange(0, TILE_COLUMNS)[:, None]
    accumulator = tl.zeros((TILE_TOKENS, ROWS), tl.float32)
    start, stop = tl.load(starts + block_row), tl.load(starts + block_row + 1)
    block = values + start.to(tl.int64) * (ROWS * COLUMNS) + within
    for index in range(start, stop):
        first = tl.load(block_columns + index) * COLUMNS
        for part in tl.static_range(COLUMNS // TILE_COLUMNS):
            column = first + part * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
            inside = (token[:, None] < tokens) & (column[None, :] < in_features)
            x_tile = tl.load(x_rows + column[None, :], mask=inside, other=0.0)
            weight = tl.load(block + part * TILE_COLUMNS)
            accumulator = tl.dot(x_tile, weight, accumulator, input_precision="ieee")
        block += ROWS * COLUMNS
    if HAS_BIAS:
        accumulator += tl.load(bias + row, mask=row < out_features, other=0.0).to(tl.float32)[None, :]
    accumulator = activate(accumulator, ACTIVATION)
    target = y + token[:, None] * stride_y + row[None, :]
    stored = (token[:, None] < tokens) & (row[None, :] < out_features)
    tl.store(target, accumulator.to(y.dtype.element_ty), mask=stored)


def block_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    block_columns: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
) -> torch.Tensor:
    """y [tokens, out] = act(x W^T + bias), accumulated in fp32 and rounded once to the dtype of ``x``.

    ``x`` [tokens, in] with unit column stride; ``values`` [kept, rows, columns] of the dtype of ``x``, block row by
    block row, padded with zeros beyond the weight; ``block_columns`` int32 [kept], which block across each one is;
    ``starts`` int32 [block rows + 1], where each block row begins. fp32 is multiplied in fp32, not in tf32.
    """
    tokens, in_features = x.shape
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, columns = values.shape[1:]
    # what Triton specialises on, and what vectors take
    aligned = all(size % 16 == 0 for size in (in_features, x.stride(0), out_features, x.data_ptr()))
    tile = choose_tile(x.dtype, rows, columns, tokens, aligned, narrow_tiles_for(x))
    grid = ((starts.shape[0] - 1) * triton.cdiv(tokens, tile.tokens),)
    block_linear_kernel[grid](
        x,
        values,
        starts,
        block_columns,
        y if bias is None else bias,
        y,
        tokens,
        out_features,
        in_features,
        x.stride(0),
        y.stride(0),
        ROWS=rows,
        COLUMNS=columns,
        HAS_BIAS=bias is not None,
        ACTIVATION=activation,
        TILE_TOKENS=tile.tokens,
        TILE_COLUMNS=tile.columns,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return y
