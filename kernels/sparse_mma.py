"""y = activation(x W^T + bias) for a 2:4 weight on sparse tensor cores: cp.async, ldmatrix, mma.sp (sm_80 on).

Takes plain tensors in the fragment layout and launches on torch's current stream. Imports triton, so it is loaded on
first use; knows nothing of packing, backends or layers.

The sparse operand of mma.sp is always the left one, so a block computes a tile of Y^T = W X^T and transposes it through
shared memory as it leaves. Weights lie in memory in the order in which lanes hold them, so that a copy of whole rows of
16 bytes is all they need; x goes through ldmatrix. Layouts are spelled out (Gluon): mma.sp is inline PTX, and only the
program can say which lane holds which element.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsecomp.kernels.gluon_compat import commit_group, copy_to_shared, wait_group
from sparsecomp.kernels.sparse_mma_config import Config, candidates
from sparsecomp.kernels.sparse_mma_tuning import bucket, tuned

_TANH_SLOPE = 2 * math.sqrt(2 / math.pi) * math.log2(math.e)


def _hex(value: float) -> str:
    """A constant of PTX: the bits of the fp32 nearest to it."""
    return "0f" + struct.pack(">f", value).hex().upper()


_CONSTRAINTS = gl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,0,1,2,3,r,r,r,r")


@gluon.constexpr_function
def _instruction(BF16, SELECTOR):
    # ordered_metadata: positions ascend within a group; the form that need not assume so may be slower
    kind = "bf16" if BF16 else "f16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, 0x{SELECTOR:x};"
    )


@gluon.constexpr_function
def _bases(count, step, axis):
    """Basis vectors of ``count`` (a power of two) places along an axis of two, ``step`` elements apart."""
    return [[step << bit, 0] if axis == 0 else [0, step << bit] for bit in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _weight_layout(WARPS_OUT, WARPS_TOKENS, ROW_TILES):
    """Fragments [tiles, 128 words]: a lane holds the 4 neighbouring words of its place in each tile of its warp."""
    registers = [[0, 1], [0, 2], *_bases(ROW_TILES, 1, 0)]
    lanes = [[0, 4 << bit] for bit in range(5)]
    warps = [[0, 0]] * (WARPS_TOKENS.bit_length() - 1) + _bases(WARPS_OUT, ROW_TILES, 0)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS_OUT * ROW_TILES, 128])


@gluon.constexpr_function
def _x_layout(WARPS_OUT, WARPS_TOKENS, TOKEN_TILES):
    """x [tokens, 16 words], 32 columns: lane (g, t) holds words t, t+4, t+8, t+12 of token g of each tile: ldmatrix."""
    registers = [[0, 4], [0, 8], *_bases(TOKEN_TILES, 8, 0)]
    lanes = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
    warps = _bases(WARPS_TOKENS, TOKEN_TILES * 8, 0) + [[0, 0]] * (WARPS_OUT.bit_length() - 1)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [WARPS_TOKENS * TOKEN_TILES * 8, 16])


@gluon.constexpr_function
def _only(axis, layout, rank):
    for other in range(rank - 1, -1, -1):
        if other != axis:
            layout = gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def _along(count: gl.constexpr, axis: gl.constexpr, layout: gl.constexpr):
    """0 to count - 1 along one axis of the six of an accumulator layout."""
    numbers = gl.arange(0, count, _only(axis, layout, 6))
    for other in gl.static_range(6):
        if other != axis:
            numbers = gl.expand_dims(numbers, other)
    return numbers


# Activations of %v1 in place. Two values are activated, rounded and packed in one block of PTX, so that their
# temporaries die before the next ones are born: as tensor operations they would spill. ex2 and rcp are the hardware's,
# good to 2e-7 (PTX ISA 8.7, section 9.7.3).
_LOGISTIC = "ex2.approx.ftz.f32 %e1, %e1; add.f32 %e1, %e1, 0f3F800000; rcp.approx.ftz.f32 %e1, %e1;"
_ACTIVATE = {
    "none": "",
    # a NaN stays
    "relu": "setp.lt.f32 %c1, %v1, 0f00000000; selp.f32 %v1, 0f00000000, %v1, %c1;",
    "silu": f"mul.f32 %e1, %v1, {_hex(-math.log2(math.e))}; {_LOGISTIC} mul.f32 %v1, %v1, %e1;",
    # (1 + tanh u) / 2 is the logistic function of 2u
    "gelu_tanh": (
        f"mul.f32 %e2, %v1, %v1; fma.rn.f32 %e1, %e2, {_hex(-0.044715 * _TANH_SLOPE)}, {_hex(-_TANH_SLOPE)};"
        f"mul.f32 %e1, %e1, %v1; {_LOGISTIC} mul.f32 %v1, %v1, %e1;"
    ),
    # x Phi(x) = max(x, 0) - |x| erfc(|x| / sqrt 2) / 2, with erfc of Abramowitz and Stegun 7.1.26, to 1.5e-7.
    # Beyond 64 the second term is 0, where infinity times 0 would not be.
    "gelu": (
        "abs.f32 %e1, %v1; min.f32 %e1, %e1, 0f42800000;"
        f"fma.rn.f32 %e2, %e1, {_hex(0.3275911 / math.sqrt(2))}, 0f3F800000; rcp.approx.ftz.f32 %e2, %e2;"
        f"fma.rn.f32 %e3, %e2, {_hex(1.061405429 / 2)}, {_hex(-1.453152027 / 2)};"
        f"fma.rn.f32 %e3, %e3, %e2, {_hex(1.421413741 / 2)}; fma.rn.f32 %e3, %e3, %e2, {_hex(-0.284496736 / 2)};"
        f"fma.rn.f32 %e3, %e3, %e2, {_hex(0.254829592 / 2)}; mul.f32 %e3, %e3, %e2; mul.f32 %e3, %e3, %e1;"
        f"mul.f32 %e2, %e1, {_hex(-math.log2(math.e) / 2)}; mul.f32 %e2, %e2, %e1; ex2.approx.ftz.f32 %e2, %e2;"
        "mul.f32 %e3, %e3, %e2; setp.lt.f32 %c1, %v1, 0f00000000; selp.f32 %e1, 0f00000000, %v1, %c1;"
        "sub.f32 %v1, %e1, %e3;"
    ),
}
ACTIVATIONS = tuple(_ACTIVATE)


@gluon.constexpr_function
def _epilogue(ACTIVATION, BF16):
    kind = "bf16x2" if BF16 else "f16x2"
    return (
        "{ .reg .f32 %v<2>; .reg .f32 %w<2>; .reg .f32 %e<4>; .reg .pred %c<2>;"
        f"mov.f32 %v1, $1; {_ACTIVATE[ACTIVATION]} mov.f32 %w1, %v1;"
        f"mov.f32 %v1, $2; {_ACTIVATE[ACTIVATION]} cvt.rn.{kind}.f32 $0, %v1, %w1; }}"
    )


@gluon.jit(
    do_not_specialize=["row_tiles", "depth_blocks", "chunks", "stride_chunks", "out_units", "tokens"],
    do_not_specialize_on_alignment=["bias"],
)
def sparse_mma_kernel(
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
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    WARPS_TOKENS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
):
    # Sizes come in units (16 rows, 64 columns, 8 elements of x, 8 outputs or 1), so that the compiler sees which
    # addresses are multiples of 16 bytes whatever the layer's shape. One variant per constant, none per size.
    WARPS: gl.constexpr = WARPS_OUT * WARPS_TOKENS
    TILES: gl.constexpr = WARPS_OUT * ROW_TILES
    TOKENS: gl.constexpr = WARPS_TOKENS * TOKEN_TILES * 8
    SLICES: gl.constexpr = DEPTH // 32
    WORDS: gl.constexpr = DEPTH // 2
    ACCUMULATOR: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, ROW_TILES, TOKEN_TILES, 4],
        [1, 1, 32, 1, 1, 1],
        [WARPS_OUT, WARPS_TOKENS, 1, 1, 1, 1],
        [5, 4, 3, 2, 1, 0],
    )
    WEIGHT_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [WARPS, 1], [1, 0])
    out_features = out_units * OUT_UNIT
    steps = (depth_blocks * 64 + DEPTH - 1) // DEPTH

    # neighbouring programs share the weights of 8 row blocks, which then stay in L2
    blocks_out, blocks_tokens = gl.cdiv(row_tiles, TILES), gl.cdiv(tokens, TOKENS)
    program, group = gl.program_id(0), gl.program_id(0) // (8 * blocks_tokens)
    rows_in_group = gl.minimum(blocks_out - group * 8, 8)
    block_out = group * 8 + program % (8 * blocks_tokens) % rows_in_group
    block_tokens = program % (8 * blocks_tokens) // rows_in_group

    weight_stages = gl.allocate_shared_memory(
        gl.int32, [STAGES, SLICES * TILES, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    x_stages = gl.allocate_shared_memory(gl.int32, [STAGES, TOKENS, WORDS], gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))

    # Rows, tokens and columns beyond the end read the last ones again: their products are not stored, or meet zeros.
    # Offsets take 32 bits beside one pointer: pointers for each row would not fit the registers.
    copied = gl.arange(0, SLICES * TILES, gl.SliceLayout(1, WEIGHT_COPY))
    tile = gl.minimum(block_out * TILES + copied % TILES, row_tiles - 1)
    weight_row = (tile * (depth_blocks * 2) * 128)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, WEIGHT_COPY))[None, :]
    first_token = block_tokens * TOKENS
    token = gl.minimum(gl.arange(0, TOKENS, gl.SliceLayout(1, X_COPY)), tokens - 1 - first_token)
    word = gl.arange(0, WORDS, gl.SliceLayout(0, X_COPY))
    x_block = x + first_token.to(gl.int64) * stride_chunks * 4
    x_row = (token * stride_chunks * 4)[:, None] + word[None, :]

    first = block_out * TILES + _along(WARPS_OUT, 0, ACCUMULATOR) * ROW_TILES
    tile_block = gl.minimum(first // 4, row_tiles // 4 - 1)
    metadata_lane = metadata + (tile_block * depth_blocks * 32 + _along(32, 2, ACCUMULATOR)) * 4
    metadata_lane = (
        metadata_lane + first // ROW_TILES % (4 // ROW_TILES) * ROW_TILES + _along(ROW_TILES, 3, ACCUMULATOR)
    )

    accumulator = gl.zeros([WARPS_OUT, WARPS_TOKENS, 32, ROW_TILES, TOKEN_TILES, 4], gl.float32, ACCUMULATOR)
    if HAS_BIAS:
        # register 2h + l of lane (g, t) holds output row g + 8h of a tile, token 2t + l
        held = (first + _along(ROW_TILES, 3, ACCUMULATOR)) * 16
        held = held + _along(32, 2, ACCUMULATOR) // 4 + _along(4, 5, ACCUMULATOR) // 2 * 8
        accumulator += gl.load(bias + held, mask=held < out_features, other=0.0).to(gl.float32)
    for stage in gl.static_range(STAGES - 1):
        _copy(
            weight_stages.index(stage),
            x_stages.index(stage),
            fragments,
            x_block,
            weight_row,
            x_row,
            copied // TILES,
            word // 4,
            stage,
            depth_blocks,
            chunks,
            SLICES,
            WORDS,
        )
        commit_group()
    positions = gl.load(metadata_lane)
    for step in range(steps):
        # all but the last STAGES - 2 groups have landed: this step's tiles are there, and the ones before are read
        wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        _copy(
            weight_stages.index(ahead % STAGES),
            x_stages.index(ahead % STAGES),
            fragments,
            x_block,
            weight_row,
            x_row,
            copied // TILES,
            word // 4,
            ahead,
            depth_blocks,
            chunks,
            SLICES,
            WORDS,
        )
        commit_group()
        weights, tokens_in = weight_stages.index(step % STAGES), x_stages.index(step % STAGES)
        for part in gl.static_range(SLICES):
            if part % 2 == 0:
                # a word of metadata serves 64 columns; the next one is fetched while this one is used
                current = positions
                following = gl.minimum(step * (DEPTH // 64) + part // 2 + 1, depth_blocks - 1)
                positions = gl.load(metadata_lane + following * 128)
            a = weights.slice(part * TILES, TILES, 0).load(_weight_layout(WARPS_OUT, WARPS_TOKENS, ROW_TILES))
            a = gl.permute(gl.reshape(a, [WARPS_OUT, ROW_TILES, 32, 4]), [0, 2, 1, 3])
            a = gl.reshape(a, [WARPS_OUT, 1, 32, ROW_TILES, 1, 4])
            a = gl.convert_layout(a, ACCUMULATOR, assert_trivial=True)
            b = tokens_in.slice(part * 16, 16, 1).load(_x_layout(WARPS_OUT, WARPS_TOKENS, TOKEN_TILES))
            b = gl.permute(gl.reshape(b, [WARPS_TOKENS, TOKEN_TILES, 8, 4, 4]), [0, 2, 4, 1, 3])
            b = gl.reshape(b, [1, WARPS_TOKENS, 32, 1, TOKEN_TILES, 4])
            b = gl.convert_layout(b, ACCUMULATOR, assert_trivial=True)
            accumulator = gl.inline_asm_elementwise(
                _instruction(BF16, part % 2), _CONSTRAINTS, [a, b, accumulator, current], gl.float32, True, 4
            )
    wait_group(0)

    result = gl.inline_asm_elementwise(
        _epilogue(ACTIVATION, BF16), "=r,f,f", [accumulator], y.dtype.element_ty, True, 2
    )
    result = gl.reshape(result, [WARPS_OUT, WARPS_TOKENS, 8, 4, ROW_TILES, TOKEN_TILES, 2, 2])
    result = gl.reshape(gl.permute(result, [1, 5, 3, 7, 0, 4, 6, 2]), [TOKENS, TILES * 16])
    ACROSS: gl.constexpr = 32 if TILES * 2 > 32 else TILES * 2
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    result = gl.convert_layout(result, STORE)
    row = block_out * TILES * 16 + gl.arange(0, TILES * 16, gl.SliceLayout(0, STORE))
    token_out = block_tokens * TOKENS + gl.arange(0, TOKENS, gl.SliceLayout(1, STORE))
    target = y + (token_out.to(gl.int64) * out_features)[:, None] + row[None, :]
    inside = (token_out < tokens)[:, None] & (row // OUT_UNIT < out_units)[None, :]
    gl.store(target, result, mask=inside)


@gluon.jit
def _copy(
    weight_stage,
    x_stage,
    fragments,
    x_block,
    weight_row,
    x_row,
    slice_index,
    chunk,
    step,
    depth_blocks,
    chunks,
    SLICES: gl.constexpr,
    WORDS: gl.constexpr,
):
    """Start copying the tiles of one step; of a step beyond the last one, nothing."""
    part = gl.minimum(step * SLICES + slice_index, depth_blocks * 2 - 1)
    wanted = (slice_index >= 0) & (step * SLICES < depth_blocks * 2)
    copy_to_shared(weight_stage, fragments + (weight_row + (part * 128)[:, None]), mask=wanted[:, None])
    inside = step * (WORDS // 4) + chunk < chunks
    copy_to_shared(x_stage, x_block + (x_row + step * WORDS), mask=inside[None, :])


def sparse_mma_linear(
    x: torch.Tensor,
    fragments: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    out_features: int,
    activation: str = "none",
    config: Config | None = None,
) -> torch.Tensor:
    """y [tokens, out] = activation(x W^T + bias), accumulated in fp32 and rounded once to the dtype of ``x``.

    ``x`` [tokens, in] in fp16 or bf16; ``fragments`` int32 [row tiles of 16, depth blocks of 32, 128] and ``metadata``
    int32 [rows / 64, columns / 64, 128] as ``sparsecomp.pack.fragments`` makes them. Rows of x that do not start at
    multiples of 16 bytes are copied once, padded; all else is read where it is. ``config`` None takes the
    fastest of a few, measured at the first call for about that many tokens.
    """
    tokens = x.shape[0]
    y = torch.empty(tokens, out_features, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x = aligned_rows(x)

    def run(config: Config) -> None:
        _run(x, fragments, metadata, bias, y, activation, config)

    if config is None:
        capability, multiprocessors = gpu(x.get_device())
        options = candidates(out_features, tokens, capability, multiprocessors)
        config = tuned(tuning_key(x.get_device(), out_features, x.shape[1], tokens), options, run)
    run(config)
    return y


def tuning_key(device: int, out_features: int, in_features: int, tokens: int) -> tuple[int, ...]:
    """What products share a measurement: those of one GPU, one padded shape and about as many tokens."""
    return (device, out_features, in_features + -in_features % 8, bucket(tokens))


def _run(
    x: torch.Tensor,
    fragments: torch.Tensor,
    metadata: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    activation: str,
    config: Config,
) -> None:
    tokens, out_features = y.shape
    row_tiles, depth_blocks = fragments.shape[0], metadata.shape[1]
    blocks = -(-row_tiles * 16 // config.out) * -(-tokens // config.tokens)
    unit = 8 if out_features % 8 == 0 else 1
    arguments = (
        fragments,
        metadata,
        x.view(torch.int32),
        y if bias is None else bias,
        y,
        row_tiles,
        depth_blocks,
        x.shape[1] // 8,
        x.stride(0) // 8,
        out_features // unit,
        tokens,
    )
    launch(arguments, constants(config, x.dtype, bias is not None, activation, unit), blocks, config.warps)


def constants(config: Config, dtype: torch.dtype, has_bias: bool, activation: str, unit: int) -> dict[str, Any]:
    """What one compiled variant of the kernel is made for."""
    return {
        "BF16": dtype == torch.bfloat16,
        "HAS_BIAS": has_bias,
        "ACTIVATION": activation,
        "OUT_UNIT": unit,
        "ROW_TILES": config.row_tiles,
        "TOKEN_TILES": config.token_tiles,
        "WARPS_OUT": config.warps_out,
        "WARPS_TOKENS": config.warps_tokens,
        "DEPTH": config.depth,
        "STAGES": config.stages,
    }


def launch(arguments: tuple[Any, ...], constants: dict[str, Any], blocks: int, warps: int) -> None:
    """Run the kernel on torch's current stream; the only function here that needs a GPU."""
    with torch.cuda.device(arguments[0].device):
        sparse_mma_kernel[(blocks,)](*arguments, **constants, num_warps=warps)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy padded with zero columns, whose rows start at multiples of 16 bytes and hold whole ones."""
    missing = -x.shape[1] % 8
    if missing:
        return torch.nn.functional.pad(x, (0, missing))
    # a single row may have any stride
    if x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=16)
def gpu(index: int) -> tuple[int, int]:
    """Compute capability, as 80 for 8.0, and multiprocessors of a CUDA device."""
    facts = torch.cuda.get_device_properties(index)
    return 10 * facts.major + facts.minor, facts.multi_processor_count
