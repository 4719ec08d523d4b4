"""A plain dense GEMM in Triton: what the same compiler and the same effort give without sparsity. Imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _dense_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    y,
    tokens,
    out_features,
    in_features,
    stride_x,
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
):
    # groups of 8 row blocks share weights in L2
    blocks_out, blocks_tokens = tl.cdiv(out_features, TILE_OUT), tl.cdiv(tokens, TILE_TOKENS)
    program, group = tl.program_id(0), tl.program_id(0) // (8 * blocks_tokens)
    rows = tl.minimum(blocks_out - group * 8, 8)
    block_out = group * 8 + program % (8 * blocks_tokens) % rows
    block_tokens = program % (8 * blocks_tokens) // rows
    row = block_out.to(tl.int64) * TILE_OUT + tl.arange(0, TILE_OUT)
    token = block_tokens.to(tl.int64) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    column = tl.arange(0, TILE_COLUMNS)
    x_tile = x + token[:, None] * stride_x + column[None, :]
    weight_tile = weight + row[None, :] * in_features + column[:, None]
    accumulator = tl.zeros((TILE_TOKENS, TILE_OUT), tl.float32)
    for start in range(0, in_features, TILE_COLUMNS):
        inside = column < in_features - start
        a = tl.load(x_tile, mask=(token[:, None] < tokens) & inside[None, :], other=0.0)
        b = tl.load(weight_tile, mask=(row[None, :] < out_features) & inside[:, None], other=0.0)
        accumulator = tl.dot(a, b, accumulator)
        x_tile += TILE_COLUMNS
        weight_tile += TILE_COLUMNS
    target = y + token[:, None] * out_features + row[None, :]
    tl.store(
        target,
        accumulator.to(y.dtype.element_ty),
        mask=(token[:, None] < tokens) & (row[None, :] < out_features),
    )


def dense_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y [tokens, out] = x [tokens, in] W^T in fp16 or bf16, accumulated in fp32."""
    tokens, columns = x.shape
    out = weight.shape[0]
    y = torch.empty(tokens, out, dtype=x.dtype, device=x.device)
    tile_tokens, tile_out, warps = (16, 64, 4) if tokens <= 16 else (64, 128, 4) if tokens <= 256 else (128, 128, 8)
    grid = (triton.cdiv(tokens, tile_tokens) * triton.cdiv(out, tile_out),)
    _dense_kernel[grid](
        x,
        weight,
        y,
        tokens,
        out,
        columns,
        x.stride(0),
        TILE_TOKENS=tile_tokens,
        TILE_OUT=tile_out,
        TILE_COLUMNS=64,
        num_warps=warps,
        num_stages=4 if tokens <= 256 else 3,
    )
    return y
