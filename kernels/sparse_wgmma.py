"""y = activation(x W^T + bias) for a 2:4 weight by wgmma.mma_async.sp with the weight in registers (sm_90).

Takes plain tensors in the fragment layout and launches on torch's current stream. Imports triton, so it is loaded on
first use; knows nothing of packing, backends or layers. An experiment: no GPU has run it.

CUTLASS reads the weight of a sparse wgmma from shared memory, 16 clocks for each instruction; fragments from registers
need none. x goes through shared memory in the 128-byte swizzle that the instruction's descriptors name. Instructions
that belong together (fence, products, commit, wait) are one block of inline PTX, so that nothing moves between them.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsecomp.kernels.gluon_compat import (
    block_barrier,
    commit_group,
    copy_to_shared,
    fence_async_shared,
    wait_group,
)
from sparsecomp.kernels.sparse_mma import aligned_rows
from sparsecomp.kernels.sparse_mma_epilogue import finish
from sparsecomp.kernels.sparse_mma_tuning import bucket, tuned
from sparsecomp.kernels.sparse_wgmma_config import CONFIGS, WgmmaConfig


@gluon.constexpr_function
def _step(TOKENS, BF16):
    """The products of a step: 4 instructions of 32 columns on the x that begins at byte $(3R) of shared memory.

    A descriptor (PTX ISA 8.7, 9.7.15.5.1) holds the address and the distance of 8 rows in units of 16 bytes, and the
    swizzle. 32 columns are 64 bytes; a row of 64 columns is followed by the next token's.
    """
    held = TOKENS // 2
    kind = "bf16" if BF16 else "f16"
    sums = "{" + ",".join(f"${i}" for i in range(held)) + "}"
    text = "{ .reg .b64 %x<2>; .reg .b32 %s<2>; .reg .pred %a<2>; setp.ne.b32 %a1, 1, 0;"
    text += f"mov.u32 %s1, global_smem; add.u32 %s1, %s1, ${3 * held}; shr.u32 %s1, %s1, 4; and.b32 %s1, %s1, 0x3fff;"
    text += "cvt.u64.u32 %x1, %s1; or.b64 %x1, %x1, 0x4000004000010000; wgmma.fence.sync.aligned;"
    for part in range(4):
        weights = ",".join(f"${held + 4 * part + i}" for i in range(4))
        if part > 0:
            text += f"add.s64 %x1, %x1, {4 if part % 2 else TOKENS * 8 - 4};"
        text += f"wgmma.mma_async.sp.sync.aligned.m64n{TOKENS}k32.f32.{kind}.{kind} {sums}, {{{weights}}}, %x1, "
        text += f"${2 * held + part // 2}, {part % 2}, %a1, 1, 1, 0;"
    return text + "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; }"


@gluon.constexpr_function
def _constraints(TOKENS):
    held = TOKENS // 2
    return ",".join(["=f"] * held + ["r"] * (3 * held) + [str(i) for i in range(held)])


@gluon.constexpr_function
def _only(axis, layout):
    for other in range(4, -1, -1):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _along(count: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """0 to count - 1 along one axis of the five of the accumulator layout."""
    numbers = gl.arange(0, count, _only(axis, layout))
    for other in gl.static_range(5):
        if other != axis:
            numbers = gl.expand_dims(numbers, other)
    return numbers


@gluon.jit
def _copy(stage, x_block, token, column, tokens_left, step, chunks, stride):
    """Start copying x of one step; tokens and columns beyond the end become zeros."""
    chunk = step * 16 + column // 8
    inside = (token < tokens_left)[:, None] & (chunk < chunks)[None, :]
    copy_to_shared(stage, x_block + (token * stride)[:, None] + (step * 128 + column)[None, :], mask=inside)


@gluon.jit(
    do_not_specialize=["row_tiles", "depth_blocks", "chunks", "stride_chunks", "out_units", "tokens"],
    do_not_specialize_on_alignment=["bias"],
)
def sparse_wgmma_kernel(
    fragments,
    metadata,
    x,
    bias,
    y,
    row_tiles,
    depth_blocks,
    chunks,
    stride_chunks,
    out_units,
    tokens,
    BF16: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OUT_UNIT: gl.constexpr,
    GROUPS: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    # Sizes come in units (16 rows, 64 columns, 8 elements of x, 8 outputs or 1), as for sparse_mma.
    WARPS: gl.constexpr = 4 * GROUPS
    OUT: gl.constexpr = 64 * GROUPS
    HELD: gl.constexpr = TOKENS // 2
    # register 4 j + 2 h + l of lane (g, t) is output g + 8 h of the warp's 16, token 8 j + 2 t + l
    ACCUMULATOR: gl.constexpr = gl.BlockedLayout(
        [1, 1, HELD // 4, 2, 2], [1, 32, 1, 1, 1], [WARPS, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    out_features = out_units * OUT_UNIT
    steps = (depth_blocks + 1) // 2
    blocks_out = (row_tiles + WARPS - 1) // WARPS
    block_out, block_tokens = gl.program_id(0) % blocks_out, gl.program_id(0) // blocks_out

    stages = gl.allocate_shared_memory(x.dtype.element_ty, [STAGES, TOKENS, 128], gl.NVMMASharedLayout(128, 16, 2))
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY))
    column = gl.arange(0, 128, gl.SliceLayout(0, X_COPY))
    tokens_left = tokens - block_tokens * TOKENS
    stride = stride_chunks * 8
    x_block = x + (block_tokens * TOKENS).to(gl.int64) * stride

    warp, lane = _along(WARPS, 0, ACCUMULATOR), _along(32, 1, ACCUMULATOR)
    tile = block_out * WARPS + warp
    stored = gl.minimum(tile, row_tiles - 1)  # tiles beyond the end read the last one again and are not stored
    word = _along(2, 3, ACCUMULATOR) * 2 + _along(2, 4, ACCUMULATOR)
    part = _along(HELD // 4, 2, ACCUMULATOR)
    weight_lane = fragments + (stored * (depth_blocks * 2) + part % 4) * 128 + lane * 4 + word
    half = _along(2, 4, ACCUMULATOR)
    metadata_lane = metadata + ((stored // 4 * depth_blocks + half) * 32 + lane) * 4 + stored % 4

    accumulator = gl.zeros([WARPS, 32, HELD // 4, 2, 2], gl.float32, ACCUMULATOR)
    if HAS_BIAS:
        held = tile * 16 + lane // 4 + _along(2, 3, ACCUMULATOR) * 8
        accumulator += gl.load(bias + held, mask=held < out_features, other=0.0).to(gl.float32)
    for stage in gl.static_range(STAGES - 1):
        _copy(stages.index(stage), x_block, token, column, tokens_left, stage, chunks, stride)
        commit_group()
    weights = gl.load(weight_lane, mask=part % 4 // 2 < depth_blocks, other=0)
    positions = gl.load(metadata_lane, mask=half < depth_blocks, other=0x44444444)
    for step in range(steps):
        # all but the last STAGES - 2 groups have landed, and wgmma reads memory by another path than cp.async wrote it
        wait_group(STAGES - 2)
        fence_async_shared()
        block_barrier()
        ahead = step + STAGES - 1
        _copy(stages.index(ahead % STAGES), x_block, token, column, tokens_left, ahead, chunks, stride)
        commit_group()
        left = depth_blocks - (step + 1) * 2
        next_weights = gl.load(weight_lane + (step + 1) * 512, mask=part % 4 // 2 < left, other=0)
        next_positions = gl.load(metadata_lane + (step + 1) * 256, mask=half < left, other=0x44444444)
        start = gl.full([WARPS, 32, 1, 1, 1], 0, gl.int32, ACCUMULATOR) + step % STAGES * (TOKENS * 256)
        accumulator = gl.inline_asm_elementwise(
            _step(TOKENS, BF16),
            _constraints(TOKENS),
            [weights, positions, start, accumulator],
            gl.float32,
            False,
            HELD,
        )
        weights, positions = next_weights, next_positions
    wait_group(0)
    stages._keep_alive()

    CODE: gl.constexpr = finish(ACTIVATION, y.dtype.element_ty, False)
    result = gl.inline_asm_elementwise(CODE[0], CODE[1], [accumulator], y.dtype.element_ty, True, 2)
    result = gl.reshape(result, [WARPS, 8, 4, HELD // 4, 2, 2])
    result = gl.reshape(gl.permute(result, [3, 2, 5, 0, 4, 1]), [TOKENS, OUT])
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (OUT // 8), OUT // 8], [WARPS, 1], [1, 0])
    result = gl.convert_layout(result, STORE)
    row = block_out * OUT + gl.arange(0, OUT, gl.SliceLayout(0, STORE))
    token_out = gl.arange(0, TOKENS, gl.SliceLayout(1, STORE))
    first = (block_tokens * TOKENS).to(gl.int64) * out_features
    target = y + first + (token_out * out_features)[:, None] + row[None, :]
    inside = (token_out < tokens_left)[:, None] & (row // OUT_UNIT < out_units)[None, :]
    gl.store(target, result, mask=inside)


def sparse_wgmma_linear(
    x: torch.Tensor,
    fragments: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    config: WgmmaConfig | None = None,
) -> torch.Tensor:
    """y [tokens, out] = activation(x W^T + bias), accumulated in fp32 and rounded once to the dtype of ``x``.

    ``x`` [tokens, in] in fp16 or bf16; ``fragments`` int32 [row tiles of 16, depth blocks of 32, 128] and ``metadata``
    int32 [rows / 64, columns / 64, 128] as ``packing.layouts.fragments`` makes them. Rows of x that do not start at
    multiples of 16 bytes are copied once. ``activation`` is one of ``sparse_mma.ACTIVATIONS``, in fp32. ``config`` None
    takes the fastest, measured at the first call for about that many tokens.
    """
    tokens = x.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = aligned_rows(x)

    def run(config: WgmmaConfig) -> None:
        row_tiles, depth_blocks = fragments.shape[0], metadata.shape[1]
        blocks = -(-row_tiles // config.warps) * -(-tokens // config.tokens)
        unit = 8 if out_features % 8 == 0 else 1
        sizes = (row_tiles, depth_blocks, x.shape[1] // 8, x.stride(0) // 8, out_features // unit, tokens)
        arguments = (fragments, metadata, x, y if bias is None else bias, y, *sizes)
        variant = constants(config, x.dtype, bias is not None, activation, unit)
        launch(arguments, variant, blocks, config.warps)

    if config is None:
        config = tuned(("wgmma", x.get_device(), out_features, x.shape[1], bucket(tokens)), CONFIGS, run)
    run(config)
    return y


def constants(config: WgmmaConfig, dtype: torch.dtype, has_bias: bool, activation: str, unit: int) -> dict[str, Any]:
    """What one compiled variant of the kernel is made for."""
    return {
        "BF16": dtype == torch.bfloat16,
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "OUT_UNIT": unit,
        "GROUPS": config.groups,
        "TOKENS": config.tokens,
        "STAGES": config.stages,
    }


def launch(arguments: tuple[Any, ...], constants: dict[str, Any], blocks: int, warps: int) -> None:
    """Run the kernel on torch's current stream; the only function here that needs a GPU."""
    with torch.cuda.device(arguments[0].device):
        sparse_wgmma_kernel[(blocks,)](*arguments, **constants, num_warps=warps)
