"""Every place of an ONNX file where a weight can stand: it is judged there, or it is named as not judged."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from sparsecomp.errors import FormatError
from sparsecomp.onnx import verify

X = "float[N, 8] x"
HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "local" : 1, "other" : 1]>'


def two_of_four(*shape, dtype=np.float32, seed=0):
    """Random numbers of which the first of two axes from behind, the reduced one of MatMul, is 2:4."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(1, 7, shape).astype(dtype)
    weight = np.ascontiguousarray(np.swapaxes(weight, -1, -2))
    weight.reshape(-1, 4)[:, [1, 3]] = 0
    return np.ascontiguousarray(np.swapaxes(weight, -1, -2))


def three_of_four(*shape, dtype=np.float32):
    """The same with one group too full."""
    weight = two_of_four(*shape, dtype=dtype)
    weight[..., 1, 0] = 3
    return weight


GOOD, BAD = two_of_four(8, 8), three_of_four(8, 8)


def written(tmp_path, text, **tensors):
    """A file of this text in ONNX's own syntax, with tensors as initialisers."""
    model = parser.parse_model(f"{HEAD}\n{text}")
    for name, array in tensors.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return save(tmp_path, model)


def save(tmp_path, model):
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def verdict(path, pattern="2:4"):
    """(names that fit, names that do not, names not seen) of a file; its text must not say more than that."""
    report = verify(path, pattern)
    fitting = [w.name for w in report.weights if w.fits]
    broken = [w.name for w in report.weights if not w.fits]
    unseen = [u.name for u in report.unseen]
    assert report.fits == bool(fitting and not broken and not unseen)
    for name in unseen:
        assert name in str(report)
    assert ("not said to fit" in str(report)) == bool(unseen)
    return fitting, broken, unseen


# --- where a constant is stored -------------------------------------------------------------------------------------


@pytest.mark.parametrize("linear", [True, False], ids=["linear", "coordinates"])
@pytest.mark.parametrize("where", ["initialiser", "Constant"])
@pytest.mark.parametrize(("weight", "place"), [(GOOD, 0), (BAD, 1)], ids=["good", "bad"])
def test_sparse_tensors(tmp_path, where, weight, place, linear):
    positions = np.argwhere(weight)
    indices = np.ravel_multi_index(positions.T, weight.shape) if linear else positions
    values = numpy_helper.from_array(weight[tuple(positions.T)], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices.astype(np.int64), "i"), weight.shape)
    constant = [helper.make_node("Constant", [], ["w"], sparse_value=sparse)] if where == "Constant" else []
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 8])
    graph = helper.make_graph([*constant, helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y])
    if where == "initialiser":
        graph.sparse_initializer.append(sparse)
    assert verdict(save(tmp_path, helper.make_model(graph)))[place] == ["w"]


@pytest.mark.parametrize(("weight", "place"), [(GOOD, 0), (BAD, 1)], ids=["good", "bad"])
def test_defaults_of_inputs_and_external_data(tmp_path, weight, place):
    path = written(tmp_path, f"g ({X}, float[8, 8] w) => (float[N, 8] y) {{ y = MatMul(x, w) }}", w=weight)
    assert verdict(path)[place] == ["w"]
    onnx.save_model(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    assert verdict(path)[place] == ["w"]
    (tmp_path / "m.data").unlink()
    with pytest.raises(FormatError, match=r'tensor "w" cannot be read from the file its numbers are in'):
        verify(path)


def test_an_input_without_a_default_is_no_weight(tmp_path):
    path = written(
        tmp_path, f"g ({X}, float[8, 8] v) => (float[N, 8] y) {{ h = MatMul(x, w) y = MatMul(h, v) }}", w=GOOD
    )
    assert verdict(path) == (["w"], [], [])


# --- subgraphs ------------------------------------------------------------------------------------------------------

IF = """g (float[N, 8] x, bool c) => (float[N, 8] y) {{
    h = MatMul(x, a)
    y = If (c) <
        then_branch = t () => (float[N, 8] one) {{ one = MatMul(h, {inner}) }},
        else_branch = e () => (float[N, 8] two) {{ two = Relu(h) }}
    >
}}"""
LOOP = """g (float[N, 8] x, int64 count) => (float[N, 8] y) {{
    yes = Constant <value = bool {{1}}> ()
    y{more} = Loop (count, yes, x{carried}) <
        body = b (int64 i, bool go, float[N, 8] h{formal}) => (bool on, float[N, 8] out{result}) {{
            on = Identity(go) {body}
        }}
    >
}}"""


@pytest.mark.parametrize(("inner", "place"), [("good", 0), ("bad", 1)])
def test_branches_name_weights_of_the_graph_around_them(tmp_path, inner, place):
    assert inner in verdict(written(tmp_path, IF.format(inner=inner), a=GOOD, good=GOOD, bad=BAD))[place]


def test_initialisers_and_constants_within_a_branch_hide_those_outside(tmp_path):
    model = onnx.load(written(tmp_path, IF.format(inner="inside"), a=GOOD))
    branch = model.graph.node[1].attribute[0].g
    branch.initializer.append(numpy_helper.from_array(BAD, "inside"))
    report = verify(save(tmp_path, model))
    assert [(w.name, w.fits) for w in report.weights] == [("a", True), ("inside", False)]
    assert "then_branch/MatMul of one" in report.weights[1].node
    del branch.initializer[:]
    branch.node.insert(0, helper.make_node("Constant", [], ["inside"], value=numpy_helper.from_array(BAD)))
    assert verdict(save(tmp_path, model)) == (["a"], ["inside"], [])


def test_a_weight_that_a_branch_chooses_is_named(tmp_path):
    text = f"""g ({X}, bool c) => (float[N, 8] y) {{
        w = If (c) <then_branch = t () => (float[8, 8] one) {{ one = Identity(a) }},
                    else_branch = e () => (float[8, 8] two) {{ two = Identity(b) }}>
        y = MatMul(x, w)
    }}"""
    assert verdict(written(tmp_path, text, a=GOOD, b=BAD)) == ([], [], ["a"])


@pytest.mark.parametrize(
    ("parts", "want"),
    [
        ({"body": "out = MatMul(h, bad)"}, ([], ["bad"], [])),
        ({"body": "out = MatMul(h, good)"}, (["good"], [], [])),
        # handed on as it is from step to step
        (
            {
                "carried": ", bad",
                "formal": ", float[8, 8] w",
                "result": ", float[8, 8] w2",
                "more": ", z",
                "body": "out = MatMul(h, w) w2 = Identity(w)",
            },
            ([], ["bad"], []),
        ),
        # changed by constants
        (
            {
                "carried": ", good",
                "formal": ", float[8, 8] w",
                "result": ", float[8, 8] w2",
                "more": ", z",
                "body": "out = MatMul(h, w) w2 = Add(w, bad)",
            },
            ([], [], ["good"]),
        ),
        # a state that begins as a constant and comes from the inputs
        (
            {
                "carried": ", state",
                "formal": ", float[N, 8] s",
                "result": ", float[N, 8] s2",
                "more": ", z",
                "body": "p = MatMul(s, good) out = Add(p, h) s2 = Add(p, h)",
            },
            (["good"], [], []),
        ),
        # one of a stack in each step
        ({"body": "w = Gather(stack, i) out = MatMul(h, w)"}, ([], [], ["stack"])),
    ],
    ids=["bad", "good", "handed on", "changed", "state", "stack"],
)
def test_loops(tmp_path, parts, want):
    text = LOOP.format(**dict.fromkeys(("carried", "formal", "result", "more"), "") | parts)
    tensors = {"good": GOOD, "bad": BAD, "state": np.zeros((1, 8), np.float32), "stack": np.stack([GOOD, BAD])}
    assert verdict(written(tmp_path, text, **tensors)) == want


@pytest.mark.parametrize(("weight", "want"), [("bad", ([], ["bad"], [])), ("part", ([], [], ["stack"]))])
def test_scans(tmp_path, weight, want):
    text = f"""g (float[3, N, 8] xs) => (float[N, 8] last, float[3, N, 8] ys) {{
        last, ys = Scan <num_scan_inputs = 2, body = b (float[N, 8] s, float[N, 8] x, float[8, 8] part)
            => (float[N, 8] s2, float[N, 8] y) {{ h = Add(s, x) y = MatMul(h, {weight}) s2 = Identity(y) }}
        > (start, xs, stack)
    }}"""
    tensors = {"start": np.zeros((1, 8), np.float32), "stack": np.stack([GOOD, BAD, GOOD]), "bad": BAD}
    assert verdict(written(tmp_path, text, **tensors)) == want


# --- functions ------------------------------------------------------------------------------------------------------


def test_functions_are_judged_at_every_call_with_what_it_passes(tmp_path):
    text = f"""g ({X}) => (float[N, 8] y) {{ h = local.layer(x, good) y = local.layer(h, bad) }}
    <domain: "local", opset_import: ["" : 21]> layer (x, w) => (y) {{ p = MatMul(x, w) y = Relu(p) }}"""
    report = verify(written(tmp_path, text, good=GOOD, bad=BAD))
    assert [(w.name, w.fits) for w in report.weights] == [("good", True), ("bad", False)]
    assert report.weights[1].node == "layer of y/MatMul of p"


def test_constants_and_attributes_and_calls_within_functions(tmp_path):
    text = f"""g ({X}) => (float[N, 8] y) {{ y = local.outer <turn = 1> (x) }}
    <domain: "local", opset_import: ["" : 21, "local" : 1]>
    outer <turn> (x) => (y) {{
        w = Constant <value = float[8, 8] {{WEIGHT}}> ()
        y = local.inner <turn : int = @turn> (x, w)
    }}
    <domain: "local", opset_import: ["" : 21]>
    inner <turn> (x, w) => (y) {{ y = Gemm <transB : int = @turn> (x, w) }}"""
    for weight, place in ((GOOD, 0), (BAD, 1)):
        numbers = ", ".join(map(str, weight.T.ravel()))  # [out, in], as the attribute of the outer call says
        assert verdict(written(tmp_path, text.replace("WEIGHT", numbers)))[place] == ["w"]


def test_a_function_that_only_bears_our_name_is_looked_into(tmp_path):
    text = f"""g ({X}) => (float[N, 8] y) {{
        y = sparsecomp.NMLinear <n = 2, m = 4, mask_rows = 1, in_features = 8> (x, w, w, w)
    }}
    <domain: "sparsecomp", opset_import: ["" : 21]>
    NMLinear (x, values, metadata, bias) => (y) {{ y = MatMul(x, values) }}"""
    assert verdict(written(tmp_path, text, w=BAD)) == ([], ["w"], [])


# --- what constant nodes make of a weight ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        ("s = Constant <value_ints = [8, 8]> () w = Reshape(v, s)", (64,)),
        ("w = Squeeze(v)", (1, 8, 8)),
        ("a = Constant <value_ints = [0]> () w = Unsqueeze(v, a)", (8, 8)),
        ("w = Concat <axis = 1> (v, v)", (8, 4)),
        ("w, u = Split <axis = 1, num_outputs = 2> (v)", (8, 16)),
        ("i = Constant <value_int = 0> () w = Gather(v, i)", (2, 8, 8)),
        ("s = Constant <value_ints = [3, 8, 8]> () w = Expand(v, s)", (8, 8)),
        ("f = Constant <value_float = 0.5> () w = Mul(f, v)", (8, 8)),
        ("w = Neg(v)", (8, 8)),
        ("a = Constant <value_ints = [0]> () b = Constant <value_ints = [8]> () w = Slice(v, a, b)", (12, 8)),
        ("w = Dropout(v)", (8, 8)),
        ("t = Transpose(v) w = Transpose(t)", (8, 8)),
        ("h = Cast <to = 10> (v) w = Cast <to = 1> (h)", (8, 8)),
    ],
    ids=lambda value: value.split("(")[0].split()[-1] if isinstance(value, str) else "",
)
def test_weights_behind_constant_nodes(tmp_path, steps, shape):
    text = f"g ({X}) => (float[N, 8] y) {{ {steps} y = MatMul(x, w) }}"
    for full, place in ((False, 0), (True, 1)):
        make = three_of_four if full else two_of_four
        weight = make(8, 8).reshape(-1) if len(shape) == 1 else make(*shape)
        got = verdict(written(tmp_path, text, v=weight))
        assert got[2] == [] and len(got[place]) == 1 and "v" in got[place][0], got


def test_a_mask_that_is_multiplied_into_a_weight_counts(tmp_path):
    text = f"g ({X}) => (float[N, 8] y) {{ w = Mul(v, mask) y = MatMul(x, w) }}"
    full = np.ones((8, 8), np.float32)
    assert verdict(written(tmp_path, text, v=full, mask=(GOOD != 0).astype(np.float32))) == (["v"], [], [])
    assert verdict(written(tmp_path, text, v=full, mask=(BAD != 0).astype(np.float32))) == ([], ["v"], [])


@pytest.mark.parametrize(
    "steps",
    [
        "w = Gather(stack, i)",
        "w = GatherElements(good, e)",
        "w = Slice(good, b, b)",
        "n = Shape(x) s = Concat <axis = 0> (n, n) w = Expand(good, s)",
        "w = Where(c, good, bad)",
        "w = other.Twist(good)",
        "w = Mul(good, gate)",
        "g2 = Sigmoid(gate) w = Add(g2, good)",
        "s = SequenceConstruct(good, good) z = Constant <value_int = 0> () w = SequenceAt(s, z)",
    ],
)
def test_weights_that_the_inputs_choose_or_scale_are_named(tmp_path, steps):
    inputs = f"{X}, int64 i, int64[8, 8] e, int64[1] b, bool c, float[1, 8] gate"
    text = f"g ({inputs}) => (float[N, 8] y) {{ {steps} y = MatMul(x, w) }}"
    got = verdict(written(tmp_path, text, good=GOOD, bad=BAD, stack=np.stack([GOOD, BAD])))
    assert got[:2] == ([], []) and got[2] and set(got[2]) <= {"good", "stack"}


# --- operators ------------------------------------------------------------------------------------------------------


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


def test_packed_layers_within_subgraphs_and_functions(tmp_path):
    import torch
    from onnx_models import random_sparse_layer

    from sparsecomp.onnx import export_onnx

    export_onnx(random_sparse_layer(8, 8, "1:4"), (torch.randn(2, 8),), tmp_path / "packed.onnx")
    packed = onnx.load(tmp_path / "packed.onnx")
    layer = packed.graph.node[0]
    model = onnx.load(written(tmp_path, IF.format(inner="a"), a=GOOD))
    model.functions.extend(packed.functions)
    model.graph.initializer.extend(packed.graph.initializer)
    branch = model.graph.node[1].attribute[0].g
    branch.node[0].CopyFrom(layer)
    branch.node[0].input[0], branch.node[0].output[0] = "h", "one"
    assert verdict(save(tmp_path, model)) == (["a", "values"], [], [])
    assert verdict(tmp_path / "m.onnx", "1:8")[1] == ["a", "values"]
    # values that the inputs give
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [8, 2]))
    branch.node[0].input[1] = "v"
    got = verify(save(tmp_path, model))
    assert not got.fits and got.unseen[0].reason == "its values are no constant of the file"
