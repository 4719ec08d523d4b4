"""The canonical format against a twin that packs number by number and bit by bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.packing import PackedWeight, pack
from sparsecomp.packing.bits import pack_positions, packed_bytes, unpack_positions
from sparsecomp.patterns import NM, VNM, Block, parse

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
ALL_NM = [(n, m) for m in (2, 4, 8, 16) for n in range(1, m + 1)]
SHAPES = st.tuples(st.integers(0, 9), st.integers(0, 41))


def bits_of(tensor):
    return tensor.contiguous().view(torch.uint8).flatten().tolist() if tensor.numel() else []


def random_weight(shape, dtype, seed):
    """Values incl. zeros of both signs and the smallest subnormals."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    weight = torch.randn(shape, generator=generator).to(dtype)
    tiny = torch.finfo(dtype).smallest_normal / 4
    pick = torch.randint(0, 10, shape, generator=generator)
    weight[pick == 0] = 0.0
    weight[pick == 1] = -0.0
    weight[pick == 2] = tiny
    weight[pick == 3] = -tiny
    return weight


def random_nm(shape, pattern, dtype, seed):
    """A weight that fits the pattern, with groups of every count up to N."""
    generator = torch.Generator().manual_seed(seed)
    out, columns = shape
    weight = random_weight(shape, dtype, seed)
    mask = torch.zeros(shape, dtype=torch.bool)
    for top in range(0, out, pattern.mask_rows):
        for left in range(0, columns, pattern.m):
            size = min(pattern.m, columns - left)
            count = int(torch.randint(0, pattern.n + 1, (), generator=generator))
            kept = torch.randperm(size, generator=generator)[:count] + left
            mask[top : top + pattern.mask_rows, kept] = True
    return torch.where(mask, weight, torch.zeros_like(weight))


def stream(positions, bits):
    """Positions -> bytes, one bit at a time."""
    flat = [(position >> i) & 1 for position in positions for i in range(bits)]
    flat += [0] * (-len(flat) % 8)
    return [sum(bit << i for i, bit in enumerate(flat[k : k + 8])) for k in range(0, len(flat), 8)]


def slow_pack(weight, nm):
    """docs/format.md, read aloud: lists of values and of metadata bytes per row."""
    out, columns = weight.shape
    numbers = weight.tolist()
    groups = -(-columns // nm.m)
    values, metadata = [], []
    for top in range(0, out, nm.mask_rows):
        tile = numbers[top : top + nm.mask_rows]
        stored = []
        for group in range(groups):
            inside = range(group * nm.m, (group + 1) * nm.m)
            used = [j % nm.m for j in inside if any(j < columns and row[j] != 0 for row in tile)]
            unused = [j for j in range(nm.m) if j not in used]
            stored.append(sorted(used + unused[: nm.n - len(used)]))
        metadata.append(stream([p for group in stored for p in group], nm.index_bits))
        for row in tile:
            padded = row + [0] * (groups * nm.m - columns)
            values.append([padded[g * nm.m + p] + 0 for g, positions in enumerate(stored) for p in positions])
    return values, metadata


def assert_same(packed, weight, nm):
    values, metadata = slow_pack(weight, nm)
    out, columns = weight.shape
    want = torch.tensor(values, dtype=torch.float64).reshape(out, nm.slots(columns)).to(weight.dtype)
    assert bits_of(packed.values) == bits_of(want)
    assert packed.metadata.tolist() == metadata
    assert bits_of(packed.unpack()) == bits_of(torch.where(weight == 0, torch.zeros_like(weight), weight))
    packed.validate()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m"), ALL_NM)
def test_every_nm_equals_the_slow_twin(n, m, dtype):
    nm = NM(n, m)
    for shape in [(1, m), (5, 3 * m - 1), (3, 37), (0, m), (2, 0), (4, 1)]:
        weight = random_nm(shape, nm, dtype, seed=n * 100 + m)
        assert_same(pack(weight, nm), weight, nm)


@settings(max_examples=150, deadline=None)
@given(SHAPES, st.sampled_from(ALL_NM), st.sampled_from((1, 2, 3, 4, 8)), st.sampled_from(DTYPES), st.integers(0, 999))
def test_random_weights_equal_the_slow_twin(shape, counts, mask_rows, dtype, seed):
    nm = NM(*counts, mask_rows)
    weight = random_nm(shape, nm, dtype, seed)
    assert_same(pack(weight, nm), weight, nm)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.sampled_from(("2:2:8", "4:2:8", "3:2:16", "64:2:8")), st.sampled_from(DTYPES), st.integers(0, 999))
def test_vnm_is_stored_as_its_row_pattern(shape, name, dtype, seed):
    pattern = parse(name)
    columns_mask = random_nm(shape, NM(4, pattern.m, pattern.v), torch.float32, seed) != 0
    rows_mask = random_nm(shape, pattern.row_pattern, torch.float32, seed + 1) != 0
    weight = random_weight(shape, dtype, seed) * (columns_mask & rows_mask)
    packed = pack(weight, name)
    assert packed.pattern == pattern
    assert_same(packed, weight, pattern.row_pattern)


@settings(max_examples=80, deadline=None)
@given(
    SHAPES, st.integers(1, 5), st.integers(1, 18), st.floats(0.05, 1.0), st.sampled_from(DTYPES), st.integers(0, 999)
)
def test_blocks_are_stored_in_grid_order(shape, rows, cols, keep, dtype, seed):
    pattern = Block(rows, cols, keep)
    out, columns = shape
    down, across = pattern.grid(out, columns)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(down * across, generator=generator)[: pattern.kept_blocks(out, columns)]
    weight = random_weight(shape, dtype, seed)
    chosen = {divmod(int(k), across) for k in order}
    for i in range(out):
        for j in range(columns):
            if (i // rows, j // cols) not in chosen:
                weight[i, j] = 0
    packed = pack(weight, pattern)
    blocks, bitmap = [], []
    for r in range(down):
        flags = []
        for c in range(across):
            block = torch.zeros(rows, cols, dtype=dtype)
            part = weight[r * rows : (r + 1) * rows, c * cols : (c + 1) * cols]
            block[: part.shape[0], : part.shape[1]] = part + 0
            flags.append(int(bool((part != 0).any())))
            if flags[-1]:
                blocks.append(block)
        bitmap.append(stream(flags, 1))
    want = torch.stack(blocks) if blocks else torch.zeros(0, rows, cols, dtype=dtype)
    assert bits_of(packed.values) == bits_of(want)
    assert tuple(packed.values.shape) == tuple(want.shape)
    assert packed.metadata.tolist() == bitmap
    assert bits_of(packed.unpack()) == bits_of(weight + 0)
    packed.validate()


def test_the_example_of_the_specification():
    weight = torch.tensor([[0, 5, 0, -3, 7, 0], [0, 0, 0, 0, 0, 9]], dtype=torch.int8)
    packed = pack(weight, "2:4")
    assert bits_of(packed.values) == [0x05, 0xFD, 0x07, 0x00, 0x00, 0x00, 0x00, 0x09]
    assert packed.metadata.tolist() == [[0x4D], [0x44]]
    assert packed.shape == (2, 6)
    assert packed.nbytes == 10
    assert packed.dense_nbytes == 12


def test_three_bit_positions_cross_bytes():
    weight = torch.zeros(1, 24, dtype=torch.float16)
    weight[0, [1, 6, 8 + 2, 8 + 7, 16 + 3, 16 + 5]] = torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.float16)
    packed = pack(weight, "2:8")
    # 1 | 6<<3 | 2<<6 | 7<<9 | 3<<12 | 5<<15 = 0x2beb1
    assert packed.metadata.tolist() == [[0xB1, 0xBE, 0x02]]


def test_shared_masks_store_the_union():
    weight = torch.tensor([[1.0, 0, 0, 0], [0, 0, 2.0, 0], [0, 0, 0, 3.0]])
    packed = pack(weight, "2:4@v2")
    assert packed.metadata.tolist() == [[0b1000], [0b1100]]
    assert packed.values.tolist() == [[1, 0], [0, 2], [0, 3]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 31])
def test_bit_streams(bits, count):
    positions = torch.randint(0, 2**bits, (3, count), dtype=torch.uint8)
    packed = pack_positions(positions, bits)
    assert packed.tolist() == [stream(row, bits) for row in positions.tolist()]
    assert packed.shape == (3, packed_bytes(count, bits))
    assert torch.equal(unpack_positions(packed, count, bits), positions)


def test_a_broken_group_is_named():
    weight = torch.zeros(4, 12)
    weight[2, 4:7] = 1.0
    with pytest.raises(PatternError, match=r"row 2, group 1 \(columns 4 to 7\): 3 nonzeros, at most 2 allowed"):
        pack(weight, "2:4")
    with pytest.raises(PatternError, match=r"rows 2 to 3 together, group 1 .*: 3 nonzeros"):
        pack(weight, "2:4@v2")
    ragged = torch.ones(1, 6)
    ragged[0, :4] = 0
    with pytest.raises(PatternError, match=r"group 1 \(columns 4 to 5\): 2 nonzeros, at most 1"):
        pack(ragged, "1:4")


def test_too_many_columns_in_a_vnm_tile_are_named():
    weight = torch.zeros(4, 16)
    weight[2, 8:10] = 1.0
    weight[3, 10:12] = 1.0
    pack(weight, "2:2:8")
    weight[2, 9] = 0
    weight[2, 15] = 1.0
    pack(weight, "4:2:8")
    weight[0, 13] = 1.0
    with pytest.raises(PatternError, match=r"rows 0 to 3 together, group 1 .*: 5 columns in use, at most 4"):
        pack(weight, "4:2:8")


def test_a_transposable_weight_is_stored_as_its_rows_and_its_columns_are_checked():
    weight = torch.eye(5, 7) + torch.eye(7).roll(1, 0)[:5]
    packed = pack(weight, "2:4@t")
    assert torch.equal(packed.unpack(), weight)
    assert torch.equal(packed.metadata, pack(weight, "2:4").metadata)
    weight[:3, 5] = 1.0
    with pytest.raises(PatternError, match="in column 5, rows 0 to 3: 3 nonzeros, at most 2 allowed"):
        pack(weight, "2:4@t")


def test_too_many_blocks_are_counted():
    with pytest.raises(PatternError, match=r"its 4 blocks: 4 in use, at most 2 allowed; prune it"):
        pack(torch.ones(4, 4), "block2x2:0.5")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "block2x2:0.5"])
def test_not_finite_is_refused_with_its_place(pattern, dtype, value):
    weight = torch.zeros(3, 4, dtype=dtype)
    weight[1, 2] = value
    with pytest.raises(PatternError, match=r"weight\[1, 2\] is -?(nan|inf)"):
        pack(weight, pattern)


@pytest.mark.parametrize(
    ("weight", "pattern", "message"),
    [
        (torch.zeros(4), "2:4", r"shape \(4,\)"),
        ([[1.0]], "2:4", "got list"),
        (torch.zeros(2, 4, dtype=torch.complex64), "2:4", "torch.complex64"),
        (torch.zeros(2, 4), "unstructured:0.5", "mask-only"),
        (torch.zeros(2, 4).to_sparse(), "2:4", "torch.sparse_coo"),
        (torch.zeros(2, 4, device="meta"), "2:4", "without content"),
    ],
)
def test_what_pack_refuses(weight, pattern, message):
    with pytest.raises(PatternError, match=message):
        pack(weight, pattern)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["2:4", "2:4@v4", "4:2:8", "block4x4:0.5"])
def test_autocast_changes_nothing(pattern, target, dtype):
    weight = torch.zeros(8, 16, dtype=dtype)
    weight[:4, 0], weight[4:, 1] = 3.0, -2.0
    plain = pack(weight, pattern)
    with torch.autocast("cpu", dtype=target):
        packed = pack(weight, pattern).validate()
        assert torch.equal(packed.unpack(), weight) and packed.dtype == dtype
    assert torch.equal(packed.values, plain.values) and torch.equal(packed.metadata, plain.metadata)


def test_pack_ignores_strides_and_gradients():
    weight = random_nm((6, 16), NM(2, 4), torch.float32, 3)
    strided = torch.zeros(16, 12)[:, ::2].copy_(weight.T).T.requires_grad_()
    assert not strided.is_contiguous()
    assert_same(pack(strided, "2:4"), weight, NM(2, 4))


def test_rounding_keeps_the_form_canonical():
    weight = torch.tensor([[0.0, 1.0, 0.0, -1e-30], [0.5, 0.0, 0.25, 0.0]])
    rounded = pack(weight, "2:4").to(dtype=torch.float16)
    direct = pack(weight.to(torch.float16), "2:4")
    assert bits_of(rounded.values) == bits_of(direct.values)
    assert rounded.metadata.tolist() == direct.metadata.tolist()
    kept = pack(weight, "2:4").to(dtype=torch.bfloat16)
    assert_same(kept, weight.to(torch.bfloat16), NM(2, 4))
    with pytest.raises(PatternError, match="overflow"):
        pack(torch.tensor([[1e30, 0.0]]), "1:2").to(dtype=torch.float16)
    with pytest.raises(PatternError, match="cannot be packed"):
        pack(weight, "2:4").to(dtype=torch.complex64)


def damaged(change):
    weight = torch.tensor([[0.0, 1.0, 0.0, 2.0, 3.0, 4.0], [5.0, 0.0, 0.0, 0.0, 0.0, 6.0]])
    packed = pack(weight, "2:4")
    values, metadata = packed.values.clone(), packed.metadata.clone()
    return PackedWeight(*change(values, metadata), packed.pattern, packed.shape)


def put(tensor, where, value):
    tensor[where] = value
    return tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v, m: (v[:, :3], m), "shapes"),
        (lambda v, m: (v, m[:1]), "shapes"),
        (lambda v, m: (v.to(torch.complex64), m), "torch.complex64"),
        (lambda v, m: (v, m.to(torch.int8)), "torch.int8"),
        (lambda v, m: (v, put(m, (0, 0), 0b01000111)), "do not ascend"),
        (lambda v, m: (v, put(m, (0, 0), 0b01000101)), "do not ascend"),
        (lambda v, m: (put(v, (0, 0), float("nan")), m), "NaN or Inf"),
        (lambda v, m: (put(v, (1, 1), -0.0), m), "not the canonical form"),
        (lambda v, m: (v, put(m, (1, 0), 0b01001000)), "not the canonical form"),
        (lambda v, m: (v, put(m, (0, 0), 0b11101101)), "not the canonical form"),
    ],
    ids=["short", "rows", "dtype", "metadata dtype", "descending", "repeated", "nan", "-0.0", "fill rule", "tail"],
)
def test_validate_finds_what_no_packer_writes(change, message):
    with pytest.raises(FormatError, match=message):
        damaged(change).validate()


def test_validate_checks_blocks_and_shared_columns():
    packed = pack(torch.eye(4), "block2x2:0.5")
    with pytest.raises(FormatError, match="the bitmap names"):
        PackedWeight(packed.values[:1], packed.metadata, packed.pattern, packed.shape).validate()
    with pytest.raises(FormatError, match="needs"):
        PackedWeight(packed.values, packed.metadata[:1], packed.pattern, packed.shape).validate()
    with pytest.raises(FormatError, match="not the canonical form"):
        PackedWeight(packed.values, packed.metadata | 4, packed.pattern, packed.shape).validate()
    rows = torch.zeros(4, 8)
    for i in range(4):
        rows[i, 2 * i : 2 * i + 2] = 1.0
    loose = pack(rows, "2:8")
    with pytest.raises(FormatError, match="8 columns in use"):
        PackedWeight(loose.values, loose.metadata, VNM(4, 2, 8), loose.shape).validate()
