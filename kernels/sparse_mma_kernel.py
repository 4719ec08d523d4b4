"""The mma.sp kernel itself: cp.async, ldmatrix, mma.sp (Gluon, sm_80 on). ``sparse_mma`` launches it.

The sparse operand of mma.sp is always the left one, so a block computes a tile of Y^T = W X^T and transposes it through
shared memory as it leaves. Weights lie in memory in the order in which lanes hold them, so that a copy of whole rows of
16 bytes is all they need; x goes through ldmatrix. Layouts are spelled out (Gluon): mma.sp is inline PTX, and only the
program can say which lane holds which element. Of every element type a tile of x is 16 words of 32 bits wide, and lanes
hold the same words, so one kernel serves all: only metadata and the instruction differ.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from sparsecomp.kernels.gluon_compat import commit_group, copy_to_shared, wait_group
from sparsecomp.kernels.sparse_mma_epilogue import finish


@gluon.constexpr_function
def _instruction(KIND, SELECTOR):
    # ordered_metadata: positions ascend within a group; the form that need not assume so may be slower
    sums = "s32" if KIND == "s8" else "f32"
    shape = {"s8": "m16n8k64", "tf32": "m16n8k16", "f16": "m16n8k32", "bf16": "m16n8k32"}[KIND]
    return (
        f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col.{sums}.{KIND}.{KIND}.{sums} "
        f"{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$12,$13,$14,$15}}, $16, 0x{SELECTOR:x};"
    )


@gluon.constexpr_function
def _constraints(KIND):
    return ",".join(["=r" if KIND == "s8" else "=f"] * 4 + ["r"] * 8 + list("0123") + ["r"] * 4)


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
def _layout(ROW_TILES, TOKEN_TILES, HELD, WARPS_OUT, WARPS_TOKENS):
    """[warps along outputs, along tokens, lanes, row tiles, token tiles, numbers]: a thread holds the last three.

    Sums are 4 numbers a tile. What rows or tokens alone have is loaded in a layout without the tiles of the other:
    Triton before 3.9 loads a number again for each register that is to hold it.
    """
    return gl.BlockedLayout(
        [1, 1, 1, ROW_TILES, TOKEN_TILES, HELD],
        [1, 1, 32, 1, 1, 1],
        [WARPS_OUT, WARPS_TOKENS, 1, 1, 1, 1],
        [5, 4, 3, 2, 1, 0],
    )


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


@gluon.jit(
    do_not_specialize=["row_tiles", "depth_blocks", "chunks", "stride_chunks", "out_units", "tokens"],
    do_not_specialize_on_alignment=["bias", "row_scales", "token_scales"],
)
def sparse_mma_kernel(
    fragments,
    metadata,
    x,
    bias,
    row_scales,
    token_scales,
    y,
    row_tiles,
    depth_blocks,
    chunks,
    stride_chunks,
    out_units,
    tokens,
    KIND: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    OUT_UNIT: gl.constexpr,
    ROW_TILES: gl.constexpr,
    TOKEN_TILES: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    WARPS_TOKENS: gl.constexpr,
    DEPTH: gl.constexpr,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
):
    # Sizes come in units (16 rows, 128 and 16 bytes of a row of x, 8 outputs or 1), so that the compiler sees which
    # addresses are multiples of 16 bytes whatever the layer's shape. One variant per constant, none per size.
    WARPS: gl.constexpr = WARPS_OUT * WARPS_TOKENS
    TILES: gl.constexpr = WARPS_OUT * ROW_TILES
    TOKENS: gl.constexpr = WARPS_TOKENS * TOKEN_TILES * 8
    SCALED: gl.constexpr = KIND == "s8"
    SUM: gl.constexpr = gl.int32 if SCALED else gl.float32
    SLICES: gl.constexpr = DEPTH // 32
    # slices that a word of metadata serves, one by each selector
    SELECTORS: gl.constexpr = 1 if SCALED else 2
    WORDS: gl.constexpr = DEPTH // 2
    ACCUMULATOR: gl.constexpr = _layout(ROW_TILES, TOKEN_TILES, 4, WARPS_OUT, WARPS_TOKENS)
    METADATA: gl.constexpr = _layout(ROW_TILES, 1, 1, WARPS_OUT, WARPS_TOKENS)
    WEIGHT_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [WARPS, 1], [1, 0])
    out_features = out_units * OUT_UNIT
    first_step, last_step = 0, (depth_blocks * 64 + DEPTH - 1) // DEPTH
    if SPLIT:
        # a share may be empty: its sums are zeros
        share = gl.cdiv(last_step, gl.num_programs(1))
        first_step = gl.program_id(1) * share
        last_step = gl.minimum(first_step + share, last_step)

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

    first = block_out * TILES + _along(WARPS_OUT, 0, METADATA) * ROW_TILES
    tile_block = gl.minimum(first // 4, row_tiles // 4 - 1)
    words_of_metadata = depth_blocks * (2 // SELECTORS)
    metadata_lane = metadata + (tile_block * words_of_metadata * 32 + _along(32, 2, METADATA)) * 4
    metadata_lane = metadata_lane + first // ROW_TILES % (4 // ROW_TILES) * ROW_TILES + _along(ROW_TILES, 3, METADATA)

    accumulator = gl.zeros([WARPS_OUT, WARPS_TOKENS, 32, ROW_TILES, TOKEN_TILES, 4], SUM, ACCUMULATOR)
    if HAS_BIAS and not SCALED and not SPLIT:
        accumulator += _of_rows(bias, block_out, out_features, ROW_TILES, WARPS_OUT, WARPS_TOKENS, ACCUMULATOR)
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
            first_step + stage,
            last_step,
            depth_blocks,
            chunks,
            SLICES,
            WORDS,
        )
        commit_group()
    positions = gl.load(metadata_lane + gl.minimum(first_step * SLICES // SELECTORS, words_of_metadata - 1) * 128)
    for step in range(first_step, last_step):
        # all but the last STAGES - 2 groups have landed: this step's tiles are there, and the ones before are read
        wait_group(STAGES - 2)
        ahead = step + STAGES - 1
        stage_ahead = (ahead - first_step) % STAGES
        _copy(
            weight_stages.index(stage_ahead),
            x_stages.index(stage_ahead),
            fragments,
            x_block,
            weight_row,
            x_row,
            copied // TILES,
            word // 4,
            ahead,
            last_step,
            depth_blocks,
            chunks,
            SLICES,
            WORDS,
        )
        commit_group()
        stage_now = (step - first_step) % STAGES
        weights, tokens_in = weight_stages.index(stage_now), x_stages.index(stage_now)
        for part in gl.static_range(SLICES):
            if part % SELECTORS == 0:
                # the next word is fetched while this one is used
                current = gl.convert_layout(positions, ACCUMULATOR, assert_trivial=True)
                following = gl.minimum((step * SLICES + part) // SELECTORS + 1, words_of_metadata - 1)
                positions = gl.load(metadata_lane + following * 128)
            a = weights.slice(part * TILES, TILES, 0).load(_weight_layout(WARPS_OUT, WARPS_TOKENS, ROW_TILES))
            if KIND == "tf32":
                a = _to_tf32(a)
            a = gl.permute(gl.reshape(a, [WARPS_OUT, ROW_TILES, 32, 4]), [0, 2, 1, 3])
            a = gl.reshape(a, [WARPS_OUT, 1, 32, ROW_TILES, 1, 4])
            a = gl.convert_layout(a, ACCUMULATOR, assert_trivial=True)
            b = tokens_in.slice(part * 16, 16, 1).load(_x_layout(WARPS_OUT, WARPS_TOKENS, TOKEN_TILES))
            if KIND == "tf32":
                b = _to_tf32(b)
            b = gl.permute(gl.reshape(b, [WARPS_TOKENS, TOKEN_TILES, 8, 4, 4]), [0, 2, 4, 1, 3])
            b = gl.reshape(b, [1, WARPS_TOKENS, 32, 1, TOKEN_TILES, 4])
            b = gl.convert_layout(b, ACCUMULATOR, assert_trivial=True)
            accumulator = gl.inline_asm_elementwise(
                _instruction(KIND, part % SELECTORS),
                _constraints(KIND),
                [a, b, accumulator, current],
                accumulator.dtype,
                True,
                4,
            )
    wait_group(0)

    OUT: gl.constexpr = y.dtype.element_ty
    CODE: gl.constexpr = finish(ACTIVATION, gl.float32 if SPLIT else OUT, SCALED)
    result = accumulator
    if SPLIT:
        y += gl.program_id(1).to(gl.int64) * tokens * out_features
    elif SCALED:
        row_scale = _of_rows(row_scales, block_out, out_features, ROW_TILES, WARPS_OUT, WARPS_TOKENS, ACCUMULATOR)
        token_scale = _of_tokens(token_scales, first_token, tokens, TOKEN_TILES, WARPS_OUT, WARPS_TOKENS, ACCUMULATOR)
        added = gl.zeros_like(row_scale)
        if HAS_BIAS:
            added = _of_rows(bias, block_out, out_features, ROW_TILES, WARPS_OUT, WARPS_TOKENS, ACCUMULATOR)
        scaled = [accumulator, row_scale, token_scale, added]
        result = gl.inline_asm_elementwise(CODE[0], CODE[1], scaled, y.dtype.element_ty, True, 2)
    else:
        result = gl.inline_asm_elementwise(CODE[0], CODE[1], [accumulator], y.dtype.element_ty, True, 2)
    result = gl.reshape(result, [WARPS_OUT, WARPS_TOKENS, 8, 4, ROW_TILES, TOKEN_TILES, 2, 2])
    result = gl.reshape(gl.permute(result, [1, 5, 3, 7, 0, 4, 6, 2]), [TOKENS, TILES * 16])
    VECTOR: gl.constexpr = 128 // OUT.primitive_bitwidth
    ACROSS: gl.constexpr = 32 if TILES * 16 // VECTOR > 32 else TILES * 16 // VECTOR
    STORE: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [WARPS, 1], [1, 0])
    result = gl.convert_layout(result, STORE)
    row = gl.arange(0, TILES * 16, gl.SliceLayout(0, STORE))
    token_out = gl.arange(0, TOKENS, gl.SliceLayout(1, STORE))
    first_row = block_out * TILES * 16
    # one pointer and 32-bit offsets, as for copies
    block = y + (first_token.to(gl.int64) * out_features + first_row)
    target = block + ((token_out * out_features)[:, None] + row[None, :])
    inside = (token_out < tokens - first_token)[:, None] & ((first_row + row) // OUT_UNIT < out_units)[None, :]
    gl.store(target, result, mask=inside)


# Register 2h + l of lane (g, t) holds output row g + 8h of a tile, token 2t + l.
@gluon.jit
def _of_rows(
    numbers,
    block_out,
    out_features,
    ROW_TILES: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    WARPS_TOKENS: gl.constexpr,
    layout: gl.constexpr,
):
    """What the rows of a thread's sums have each, as fp32."""
    OWN: gl.constexpr = _layout(ROW_TILES, 1, 2, WARPS_OUT, WARPS_TOKENS)
    tile = block_out * (WARPS_OUT * ROW_TILES) + _along(WARPS_OUT, 0, OWN) * ROW_TILES + _along(ROW_TILES, 3, OWN)
    row = tile * 16 + _along(32, 2, OWN) // 4 + _along(2, 5, OWN) * 8
    found = gl.load(numbers + row, mask=row < out_features, other=0.0).to(gl.float32)
    found = gl.reshape(gl.join(found, found), [WARPS_OUT, 1, 32, ROW_TILES, 1, 4])
    return gl.convert_layout(found, layout, assert_trivial=True)


@gluon.jit
def _of_tokens(
    numbers,
    first_token,
    tokens,
    TOKEN_TILES: gl.constexpr,
    WARPS_OUT: gl.constexpr,
    WARPS_TOKENS: gl.constexpr,
    layout: gl.constexpr,
):
    """What the tokens of a thread's sums have each."""
    OWN: gl.constexpr = _layout(1, TOKEN_TILES, 2, WARPS_OUT, WARPS_TOKENS)
    tile = _along(WARPS_TOKENS, 1, OWN) * TOKEN_TILES + _along(TOKEN_TILES, 4, OWN)
    token = first_token + tile * 8 + _along(32, 2, OWN) % 4 * 2 + _along(2, 5, OWN)
    found = gl.load(numbers + token, mask=token < tokens, other=0.0)
    found = gl.permute(gl.join(found, found), [0, 1, 2, 3, 4, 6, 5])
    found = gl.reshape(found, [1, WARPS_TOKENS, 32, 1, TOKEN_TILES, 4])
    return gl.convert_layout(found, layout, assert_trivial=True)


@gluon.jit
def _to_tf32(words):
    # the tensor core leaves open what it makes of bits that tf32 does not have
    return gl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [words], gl.int32, True, 1)


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
    last_step,
    depth_blocks,
    chunks,
    SLICES: gl.constexpr,
    WORDS: gl.constexpr,
):
    """Start copying the tiles of one step; of a step beyond the last one, nothing."""
    part = gl.minimum(step * SLICES + slice_index, depth_blocks * 2 - 1)
    wanted = (slice_index >= 0) & (step < last_step)
    copy_to_shared(weight_stage, fragments + (weight_row + (part * 128)[:, None]), mask=wanted[:, None])
    inside = (step * (WORDS // 4) + chunk < chunks) & (step < last_step)
    copy_to_shared(x_stage, x_block + (x_row + step * WORDS), mask=inside[None, :])
