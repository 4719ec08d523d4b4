"""Every operator that multiplies by a weight: along which axis it is judged, and what counts as zero."""

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.onnx.verify_files import BAD, GOOD, X, save, three_of_four, two_of_four, verdict, written


def int8(weight, point, dtype=np.uint8):
    """Zeros of the weight at the zero point."""
    return (weight + point).astype(dtype)


QUANTISED = {
    "MatMulInteger": "y = MatMulInteger(q, w, p, p)",
    "QLinearMatMul": "y = QLinearMatMul(q, s, p, w, s, p, s, p)",
    "MatMulIntegerToFloat": "y = com.microsoft.MatMulIntegerToFloat(q, w, s, s, p, p)",
    "DynamicQuantizeMatMul": "y = com.microsoft.DynamicQuantizeMatMul(x, w, s, p)",
    "QGemm": "y = com.microsoft.QGemm(q, s, p, w, s, p)",
    "QAttention": "y = com.microsoft.QAttention <num_heads = 1> (q, w, z, s, s, mask, p, p)",
    "DequantizeLinear": "v = DequantizeLinear(w, s, p) y = MatMul(x, v)",
    "MatMulInteger16": "v = Sub(w, p) y = com.microsoft.MatMulInteger16(q, v)",
}


@pytest.mark.parametrize("operator", QUANTISED)
def test_a_quantised_weight_is_zero_at_its_zero_point(tmp_path, operator):
    text = f"g ({X}, uint8[N, 8] q, int32[N] mask, float z) => (float[N, 8] y) {{ {QUANTISED[operator]} }}"
    scale, point = np.array(0.5, np.float32), np.array(3, np.uint8)
    for weight, place in ((GOOD, 0), (BAD, 1)):
        path = written(tmp_path, text, w=int8(weight, 3), s=scale, p=point)
        assert verdict(path)[place] == ["w"] and verdict(path)[2] == []
    # by columns, of which the first has another zero point
    points = np.array([5, *[3] * 7], np.uint8)
    if operator not in ("DequantizeLinear", "MatMulInteger16"):
        assert verdict(written(tmp_path, text, w=int8(GOOD, points), s=scale, p=points))[0] == ["w"]
        assert verdict(written(tmp_path, text, w=int8(GOOD, 3), s=scale, p=points))[1] == ["w"]


@pytest.mark.parametrize("operator", ["ConvInteger", "QLinearConv"])
def test_quantised_convolutions(tmp_path, operator):
    call = {"ConvInteger": "ConvInteger(q, w, p, p)", "QLinearConv": "QLinearConv(q, s, p, w, s, p, s, p)"}[operator]
    text = f"g (uint8[N, 8, 5, 5] q) => (float[N, 8, 3, 3] y) {{ y = {call} }}"
    scale, point = np.array(0.5, np.float32), np.array(3, np.uint8)
    for weight, place in ((two_of_four(3, 3, 8, 6), 0), (three_of_four(3, 3, 8, 6), 1)):
        w = int8(np.ascontiguousarray(weight.transpose(3, 2, 0, 1)), 3)
        assert verdict(written(tmp_path, text, w=w, s=scale, p=point))[place] == ["w"]


def test_a_zero_point_from_the_inputs_is_named(tmp_path):
    text = "g (uint8[N, 8] q, uint8 p) => (int32[N, 8] y) { y = MatMulInteger(q, w, p, p) }"
    assert verdict(written(tmp_path, text, w=int8(GOOD, 3))) == ([], [], ["w"])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("points", ["none", "packed"])
def test_blocks_of_few_bits(tmp_path, bits, points):
    rng, out, columns, block = np.random.default_rng(0), 6, 64, 32
    zero = rng.integers(0, 1 << bits, (out, 2)) if points == "packed" else np.full((out, 2), 1 << (bits - 1))
    inputs = "x, w, s, p" if points == "packed" else "x, w, s"
    text = f"""g (float[N, 64] x) => (float[N, 6] y) {{
        y = com.microsoft.MatMulNBits <K = 64, N = 6, bits = {bits}, block_size = {block}> ({inputs})
    }}"""

    def packed(numbers):
        """[rows, n] -> bytes, the first number in the lowest bits."""
        wide = np.zeros((len(numbers), -(-numbers.shape[1] * bits // 8) * 8 // bits), np.int64)
        wide[:, : numbers.shape[1]] = numbers
        parts = wide.reshape(len(numbers), -1, 8 // bits) << np.arange(0, 8, bits)
        return parts.sum(axis=2).astype(np.uint8)

    for full, place in ((0, 0), (1, 1)):
        nonzero = np.zeros((out, columns), bool)
        nonzero.reshape(-1, 4)[:, : 2 + full] = True
        wide = zero.repeat(block, 1)
        numbers = np.where(nonzero, (wide + 1) % (1 << bits), wide)
        w = packed(numbers).reshape(out, 2, -1)
        got = verdict(written(tmp_path, text, w=w, s=np.ones((out, 2), np.float32), p=packed(zero)))
        assert got[place] == ["w"] and got[2] == [], got


@pytest.mark.parametrize(
    ("call", "turn"),
    [
        ("com.microsoft.FusedMatMul(x, w)", False),
        ("com.microsoft.FusedMatMul <transB = 1> (x, w)", True),
        ("com.microsoft.FusedGemm <transB = 1, activation = \"Relu\"> (x, w, b)", True),
        ("com.microsoft.GemmFastGelu(x, w)", False),
        ("com.microsoft.Attention <num_heads = 1> (x, w, b)", False),
        ("Einsum <equation = \"ni,io->no\"> (x, w)", False),
        ("Einsum <equation = \"ni,oi\"> (x, w)", True),
        ("Einsum <equation = \"io, ...i -> ...o\"> (w, x)", False),
        ("Gemm <transA = 1> (w, x)", False),
        ("MatMul(w, x)", True),
    ],
)  # fmt: skip
def test_other_products(tmp_path, call, turn):
    text = f"g ({X}) => (float[N, 8] y) {{ y = {call} }}"
    for weight, place in ((GOOD, 0), (BAD, 1)):
        tensors = {"w": np.ascontiguousarray(weight.T) if turn else weight, "b": np.ones(8, np.float32)}
        assert verdict(written(tmp_path, text, **tensors))[place] == ["w"]
        tensors["w"] = np.ascontiguousarray(tensors["w"].T)
        assert verdict(written(tmp_path, text, **tensors))[1] == ["w"]


def test_an_einsum_over_two_axes_reduces_them_as_one(tmp_path):
    text = 'g (float[N, 4, 2] x) => (float[N, 8] y) { y = Einsum <equation = "nhd,hdo->no"> (x, w) }'
    assert verdict(written(tmp_path, text, w=GOOD.reshape(4, 2, 8)))[0] == ["w"]
    assert verdict(written(tmp_path, text, w=BAD.reshape(4, 2, 8)))[1] == ["w"]
    scaled = 'g (float[N, 8, 8] x) => (float[N, 8, 8] y) { y = Einsum <equation = "nij,ij->nij"> (x, w) }'
    assert verdict(written(tmp_path, scaled, w=BAD)) == ([], [], [])
    diagonal = 'g (float[N, 8] x) => (float[N] y) { y = Einsum <equation = "ni,ii->n"> (x, w) }'
    assert verdict(written(tmp_path, diagonal, w=BAD)) == ([], [], ["w"])


def test_stacks_and_vectors_of_matmul(tmp_path):
    text = "g (float[5, N, 8] x) => (float[5, N, 8] y) { y = MatMul(x, w) }"
    stack = np.stack([GOOD] * 4 + [BAD])
    assert verdict(written(tmp_path, text, w=np.stack([GOOD] * 5)))[0] == ["w"]
    assert verdict(written(tmp_path, text, w=stack))[1] == ["w"]
    assert verdict(written(tmp_path, text, w=GOOD[:, 0].copy()))[0] == ["w"]
    assert verdict(written(tmp_path, text, w=BAD[:, 0].copy()))[1] == ["w"]


def test_transposed_convolutions_reduce_the_inputs_of_a_group(tmp_path):
    text = "g (float[N, 16, 5, 5] x) => (float[N, 12, 7, 7] y) { y = ConvTranspose <group = 2> (x, w) }"
    # [16 in, 6 out of each group, 3, 3]; the inputs of a group are 8 consecutive ones
    for make, place in ((two_of_four, 0), (three_of_four, 1)):
        groups = [np.moveaxis(make(3, 3, 8, 6, dtype=np.float32), (0, 1), (2, 3)) for _ in range(2)]
        assert verdict(written(tmp_path, text, w=np.concatenate(groups)))[place] == ["w"]


@pytest.mark.parametrize(("operator", "gates"), [("RNN", 1), ("GRU", 3), ("LSTM", 4)])
def test_recurrent_weights_are_judged_both(tmp_path, operator, gates):
    text = f"g (float[5, N, 8] x) => (float[5, 1, N, 8] y) {{ y = {operator} <hidden_size = 8> (x, w, r) }}"
    good, bad = (np.tile(weight.T, (gates, 1))[None].copy() for weight in (GOOD, BAD))
    assert verdict(written(tmp_path, text, w=good, r=bad)) == (["w"], ["r"], [])


def test_what_is_not_known_is_named(tmp_path):
    text = f"""g ({X}, int64[N] i) => (float[N, 8] y) {{
        a = MatMul(x, good) b = other.Dense(a, w, bias) c = com.microsoft.MoE <k = 1> (b, x, experts)
        y = ai.onnx.ml.LinearRegressor <coefficients = [1.0, 2.0]> (c)
    }}"""
    tensors = {"good": GOOD, "w": GOOD, "bias": np.ones(8, np.float32), "experts": np.stack([GOOD] * 2)}
    assert verdict(written(tmp_path, text, **tensors)) == (["good"], [], ["w", "experts", ""])


@pytest.mark.parametrize(
    "attribute",
    [
        helper.make_attribute("coefficients", [0.5] * 64),
        helper.make_attribute("compiled", b"x" * 4096),
        helper.make_attribute("matrix", numpy_helper.from_array(GOOD, "m")),
    ],
    ids=lambda attribute: attribute.name,
)
def test_attributes_of_unknown_operators_are_named(tmp_path, attribute):
    path = written(tmp_path, f"g ({X}) => (float[N, 8] y) {{ h = MatMul(x, w) y = other.Whole(h) }}", w=GOOD)
    assert verdict(path) == (["w"], [], [])
    model = onnx.load(path)
    model.graph.node[1].attribute.append(attribute)
    assert verdict(save(tmp_path, model)) == (["w"], [], [attribute.name])


def test_a_long_row_of_numbers_for_an_unknown_operator_is_named(tmp_path):
    text = f"g ({X}) => (float[N, 8] y) {{ h = MatMul(x, w) y = other.Flat(h, flat) }}"
    assert verdict(written(tmp_path, text, w=GOOD, flat=np.ones(70_000, np.float32))) == (["w"], [], ["flat"])
    assert verdict(written(tmp_path, text, w=GOOD, flat=np.ones(7_000, np.float32))) == (["w"], [], [])


@pytest.mark.parametrize("domain", ["", "com.microsoft."])
def test_zero_points_by_columns_and_by_blocks_of_rows(tmp_path, domain):
    text = f"g ({X}) => (float[N, 8] y) {{ v = {domain}DequantizeLinear <ATTRIBUTES> (w, s, p) y = MatMul(x, v) }}"
    cases = [("axis = 1", np.array([5, *[3] * 7], np.uint8)), ("axis = 0", np.array([3, 5, *[3] * 6], np.uint8))]
    if not domain:
        cases.append(("axis = 0, block_size = 4", np.array([[3] * 8, [6] * 8], np.uint8)))
    for attributes, points in cases:
        spread = {"axis = 1": points, "axis = 0": points[:, None]}.get(attributes, points.repeat(4, 0))
        named = text.replace("ATTRIBUTES", attributes)
        scales = np.full(points.shape, 0.5, np.float32)
        for weight, place in ((GOOD, 0), (BAD, 1)):
            got = verdict(written(tmp_path, named, w=(weight + spread).astype(np.uint8), s=scales, p=points))
            assert got[place] == ["w"] and got[2] == []
        assert verdict(written(tmp_path, named, w=(GOOD + 3).astype(np.uint8), s=scales, p=points))[1] == ["w"]


def test_a_product_that_is_written_as_multiply_and_sum_is_named(tmp_path):
    text = (
        f"g ({X}) => (float[N, 8] y) {{ u = Unsqueeze(x, axis) d = Mul(u, w) y = ReduceSum <keepdims = 0> (d, last) }}"
    )
    axes = {"axis": np.array([1]), "last": np.array([2])}
    assert verdict(written(tmp_path, text, w=GOOD, **axes)) == ([], [], ["w"])


def test_activations_lookups_and_tables_are_no_weights(tmp_path):
    text = """g (int64[N, T] i, float[N, T, T] mask) => (float[N, T, 8] y) {
        e = Gather(table, i) h = Add(e, positions) n = LayerNormalization(h, one)
        q = MatMul(n, good) k = MatMul(n, good2) turned = Mul(q, cosines)
        kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul(turned, kt) t = Add(s, mask) p = Softmax(t)
        n2 = Identity(k) v = MatMul(p, n2) y = com.microsoft.SkipLayerNormalization(v, n, one)
    }"""
    full = np.ones((50, 8), np.float32)
    tensors = {"table": full, "positions": full, "cosines": full, "one": full[0].copy()}
    assert verdict(written(tmp_path, text, good=GOOD, good2=GOOD, **tensors)) == (["good", "good2"], [], [])


@pytest.mark.parametrize(
    "call",
    [
        "com.microsoft.MatMulNBits <K = 64, N = 6, bits = 4, block_size = 32> (x, w, w)",
        "com.microsoft.MatMulNBits <N = 8> (x, w, w)",
        "ConvTranspose <group = 3> (x, w)",
        'Einsum <equation = "ni,ijkl->nj"> (x, w)',
        "sparsecomp.NMLinear <n = 5, m = 4, mask_rows = 1, in_features = 8> (x, w, w, w)",
        "sparsecomp.NMLinear (x, w, w, w)",
    ],
)
def test_a_file_that_breaks_the_rules_of_its_operators_is_no_crash(tmp_path, call):
    assert verdict(written(tmp_path, f"g ({X}) => (float[N, 8] y) {{ y = {call} }}", w=GOOD)) == ([], [], ["w"])


def test_a_table_that_is_added_to_scores_of_its_own_shape_is_no_weight(tmp_path):
    text = """g (float[1, 2, 8, 8] q, float[1, 2, 8, 8] k, float[1, 1, 8, 8] mask) => (float[1, 2, 8, 8] y) {
        h = MatMul(q, w) s = MatMul(h, k) b = Add(bias, mask) t = Add(s, b) p = Softmax(t) y = MatMul(p, k)
    }"""
    bias = np.ones((1, 2, 8, 8), np.float32)
    assert verdict(written(tmp_path, text, w=GOOD, bias=bias)) == (["w"], [], [])
