"""The verifier against files made by hand and by the exporter."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from sparsecomp.errors import FormatError, PatternError
from sparsecomp.onnx import export_onnx, verify
from tests.onnx.onnx_models import Mixed, random_sparse_layer


def two_of_four(rows, columns, seed=0):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, columns // 4, 4)).astype(np.float32)
    weight[..., :2] = 0
    return rng.permuted(weight, axis=2).reshape(rows, columns)


def one_node(path, operator, weight, *, operand=1, before=(), weight_name="w", **attributes):
    """A file with one node whose weight is an initialiser, perhaps behind other nodes."""
    inputs = ["x", "x"]
    inputs[operand] = weight_name
    nodes = [*before, helper.make_node(operator, inputs, ["y"], name="the_node", **attributes)]
    initialisers = [numpy_helper.from_array(weight, "w")]
    initialisers += [numpy_helper.from_array(np.float32(0.5).reshape(()), "scale")]
    initialisers += [numpy_helper.from_array(np.array(3, dtype=np.int8), "point")]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [x], [y], initialisers)
    onnx.save(helper.make_model(graph), path)
    return path


@pytest.mark.parametrize(
    ("operator", "attributes", "operand", "turn"),
    [
        ("MatMul", {}, 1, True),
        ("MatMul", {}, 0, False),
        ("Gemm", {"transB": 1}, 1, False),
        ("Gemm", {}, 1, True),
        ("Gemm", {}, 0, False),
        ("Gemm", {"transA": 1}, 0, True),
    ],
)
def test_the_reduced_axis(tmp_path, operator, attributes, operand, turn):
    weight = two_of_four(12, 16)
    path = one_node(tmp_path / "m", operator, weight.T if turn else weight, operand=operand, **attributes)
    report = verify(path)
    assert report.fits
    assert (report.weights[0].name, report.weights[0].density) == ("w", 0.5)
    turned = verify(one_node(tmp_path / "m", operator, weight if turn else weight.T, operand=operand, **attributes))
    assert not turned.fits
    assert "nonzeros, at most 2 allowed" in turned.weights[0].reason


def test_conv_is_judged_along_its_input_channels(tmp_path):
    weight = two_of_four(6 * 9, 8).reshape(6, 3, 3, 8).transpose(0, 3, 1, 2)
    assert verify(one_node(tmp_path / "m", "Conv", np.ascontiguousarray(weight))).fits
    dense = np.ones((6, 8, 3, 3), dtype=np.float32)
    report = verify(one_node(tmp_path / "m", "Conv", dense))
    assert report.weights[0].tightest == ("2:2", "4:4", "8:8", "8:16")


def test_the_first_broken_group_is_named(tmp_path):
    weight = two_of_four(4, 14 + 2)[:, :14]
    weight[2, 12:14] = 1
    weight[1, 4:8] = [1, 1, 0, 1]
    found = verify(one_node(tmp_path / "m", "Gemm", weight, transB=1)).weights[0]
    assert found.reason.startswith(
        "row 1, group 1 (inputs 4 to 7): 3 nonzeros, at most 2 allowed; 1 of 16 groups break it; it fits "
    )
    assert "3:4" in found.tightest
    ragged = verify(one_node(tmp_path / "m", "Gemm", weight, transB=1), "1:4").weights[0]
    assert "row 0, group 0 (inputs 0 to 3)" in ragged.reason


def test_weights_behind_other_nodes(tmp_path):
    turn = helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0])
    same = helper.make_node("Identity", ["t"], ["i"])
    weight = two_of_four(8, 16)
    assert verify(one_node(tmp_path / "m", "MatMul", weight, before=[turn, same], weight_name="i")).fits
    unscale = helper.make_node("DequantizeLinear", ["w", "scale", "point"], ["d"])
    int8 = np.where(weight.T != 0, 5, 3).astype(np.int8)
    assert verify(one_node(tmp_path / "m", "MatMul", int8, before=[unscale], weight_name="d")).fits


def test_exported_files(tmp_path):
    net = Mixed()
    export_onnx(net, (torch.randn(2, 22),), tmp_path / "dense.onnx", form="dense")
    report = verify(tmp_path / "dense.onnx")
    # "twice" and "also" are one module, and it is used twice
    assert [(w.name.replace("also", "twice"), w.fits) for w in report.weights] == [
        ("up.weight", True),
        ("twice.weight", True),
        ("twice.weight", True),
        ("down.weight", False),
    ]
    assert not report.fits
    assert "up.weight" in str(report)
    packed = nn.Sequential(random_sparse_layer(8, 16, "2:4"), random_sparse_layer(8, 8, "1:2"))
    export_onnx(packed, (torch.randn(2, 16),), tmp_path / "packed.onnx")
    assert [(w.fits, w.reason) for w in verify(tmp_path / "packed.onnx").weights] == [
        (True, "packed 2:4"),
        (True, "packed 1:2"),
    ]
    assert verify(tmp_path / "packed.onnx", "4:8").fits
    assert not verify(tmp_path / "packed.onnx", "1:4").fits


def test_what_verify_refuses(tmp_path):
    (tmp_path / "text").write_text("no model")
    for path in (tmp_path / "text", tmp_path / "gone"):
        with pytest.raises(FormatError, match="cannot be read"):
            verify(path)
    weight = one_node(tmp_path / "m", "MatMul", two_of_four(8, 8))
    for pattern in ("block4x4:0.5", "2:4@v4"):
        with pytest.raises(PatternError, match="verify takes an N:M pattern"):
            verify(weight, pattern)


def test_the_public_name_is_the_same_function(tmp_path):
    import sparsecomp as sc

    path = one_node(tmp_path / "m", "MatMul", two_of_four(8, 8).T)
    assert sc.verify_onnx is verify
    assert sc.verify_onnx(path, "2:4").fits
    assert not sc.verify_onnx(path, "1:4").fits
