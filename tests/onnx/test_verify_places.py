"""Every place of an ONNX file where a weight can stand: it is judged there, or it is named as not judged."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sparsecomp.errors import FormatError
from sparsecomp.onnx import verify
from tests.onnx.verify_files import BAD, GOOD, X, save, three_of_four, two_of_four, verdict, written

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
        ("w = CastLike(v, x)", (8, 8)),
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
        "w = Max(good, gate)",
        "w = Concat <axis = 0> (good, gate)",
        "w = ScatterElements(good, e, full)",
        "w = DequantizeLinear(good, gain)",
        "s = SequenceConstruct(good, good) z = Constant <value_int = 0> () w = SequenceAt(s, z)",
    ],
)
def test_weights_that_the_inputs_choose_or_scale_are_named(tmp_path, steps):
    inputs = f"{X}, int64 i, int64[8, 8] e, int64[1] b, bool c, float[1, 8] gate, float[8, 8] full, float gain"
    text = f"g ({inputs}) => (float[N, 8] y) {{ {steps} y = MatMul(x, w) }}"
    got = verdict(written(tmp_path, text, good=GOOD, bad=BAD, stack=np.stack([GOOD, BAD])))
    assert got[:2] == ([], []) and got[2] and set(got[2]) <= {"good", "stack"}


def test_packed_layers_within_subgraphs_and_functions(tmp_path):
    import torch

    from sparsecomp.onnx import export_onnx
    from tests.onnx.onnx_models import random_sparse_layer

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


def test_a_packed_layer_is_judged_alike_whole_inlined_and_with_another_body(tmp_path):
    import torch
    from onnx.inliner import inline_local_functions

    from sparsecomp.onnx import export_onnx
    from tests.onnx.onnx_models import random_sparse_layer

    export_onnx(random_sparse_layer(26, 22, "3:8"), (torch.randn(2, 22),), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    files = [inline_local_functions(model), onnx.ModelProto(), onnx.ModelProto()]
    files[1].CopyFrom(model)
    files[1].functions[0].node.insert(0, helper.make_node("Identity", ["x"], ["unused"]))
    for each in [model, *files[:2]]:
        report = verify(save(tmp_path, each), "3:8")
        assert report.fits
        assert report.weights[0].density == pytest.approx(3 / 8, abs=0.04)
        assert verdict(tmp_path / "m.onnx", "2:8") == ([], ["values"], [])
    # attributes that promise more than the values keep
    files[2].CopyFrom(model)
    next(each for each in files[2].graph.node[0].attribute if each.name == "n").i = 1
    assert verdict(save(tmp_path, files[2]), "3:8") == ([], [], ["values"])
