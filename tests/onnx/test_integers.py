"""Layers of integers in ONNX files: the function body, our operator, and what is written into the file."""

from __future__ import annotations

import ctypes
import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx import export_onnx, onnx_session, session, verify
from sparsecomp.onnx.function import DENSE_INTEGERS, INTEGERS, operator
from tests.onnx.onnx_models import assert_close, run_reference, run_session, run_stock, torch_output

onnx = pytest.importorskip("onnx")
pytestmark = pytest.mark.slow  # every test exports a model
needs_library = pytest.mark.skipif(session.library_path() is None, reason="the operator library is not built")

KINDS = {"8:16": INTEGERS, "3:8@v5": INTEGERS, "2:4": INTEGERS, "16:16": DENSE_INTEGERS, "4:4": DENSE_INTEGERS}


def layer(out: int, columns: int, pattern: str, activation: str = "none", bias: bool = True) -> SparseLinear:
    torch.manual_seed(0)
    linear = nn.Linear(columns, out, bias=bias)
    options = {"quantize": "int8", "activations": "int8", "activation": activation}
    return SparseLinear.from_linear(linear, pattern, method="magnitude", **options)


def model(pattern: str, activation: str = "none", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Ragged shapes for every M."""
    made = nn.Sequential(layer(19, 22, pattern, activation), nn.Tanh(), layer(9, 19, pattern, bias=False))
    return made.to(dtype).eval()


def on_a_grid(batch: int) -> torch.Tensor:
    """Rows that rounding leaves as they are, so that two ways to divide cannot round to two sides."""
    x = torch.randint(-100, 155, (batch, 22)).float()
    x[:, 0], x[:, 1] = -100, 154
    return x / 64


def runs() -> int:
    function = ctypes.CDLL(str(session.library_path())).sparsecomp_ort_runs
    function.restype = ctypes.c_int64
    return int(function())


@pytest.mark.parametrize("pattern", KINDS)
def test_the_function_body_is_the_layer(tmp_path: Path, pattern: str) -> None:
    one = layer(19, 22, pattern, "gelu").eval()
    report = export_onnx(one, (torch.randn(3, 22),), tmp_path / "m.onnx")
    assert [each.form for each in report.layers] == ["packed"] and report.layers[0].note == ""
    file = onnx.load(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(file, full_check=True)
    assert [node.op_type for node in file.graph.node] == [operator(KINDS[pattern], "gelu")]
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in file.graph.initializer}
    assert stored.keys() == {"values", "scales", "bias"} | ({"metadata"} if KINDS[pattern] == INTEGERS else set())
    assert (stored["values"] == one.packed().values.numpy()).all() and stored["values"].dtype.name == "int8"
    x = on_a_grid(5)
    for run in (run_reference, run_stock):
        assert_close(run(tmp_path / "m.onnx", x.numpy()), torch_output(one, x))
        assert run(tmp_path / "m.onnx", x[:0].numpy()).shape == (0, 19)
    x[3, 4] = math.nan
    got = torch.from_numpy(run_stock(tmp_path / "m.onnx", x.numpy()))
    assert bool(got[3].isnan().all()) and not bool(got[[0, 1, 2, 4]].isnan().any())


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", ["8:16", "3:8@v5", "16:16"])
def test_our_kernel_runs_and_is_right(tmp_path: Path, pattern: str, dtype: torch.dtype) -> None:
    net = model(pattern, "silu", dtype)
    export_onnx(net, (torch.randn(3, 22).to(dtype),), tmp_path / "m.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        fast = onnx_session(tmp_path / "m.onnx")
    for batch in (0, 1, 9):
        x, before = on_a_grid(batch).to(dtype), runs()
        got = run_session(fast, x.numpy())
        assert runs() - before == 2
        assert_close(got, torch_output(net, x), torch.float16)  # between the layers a number may round to either side


@needs_library
def test_slices_and_threads_change_nothing(tmp_path: Path) -> None:
    for pattern in ("8:16", "16:16"):
        net = layer(330, 22, pattern).eval()
        export_onnx(net, (torch.randn(3, 22),), tmp_path / "m.onnx")
        for threads in (1, 2):
            fast = onnx_session(tmp_path / "m.onnx", intra_op_num_threads=threads)
            x = on_a_grid(130)
            assert_close(run_session(fast, x.numpy()), torch_output(net, x))


@pytest.mark.parametrize("pattern", ["8:16", "16:16"])
def test_files_are_judged_by_what_they_multiply(tmp_path: Path, pattern: str) -> None:
    export_onnx(layer(32, 32, pattern).eval(), (torch.randn(3, 32),), tmp_path / "m.onnx")
    found = verify(tmp_path / "m.onnx", "8:16")
    assert [each.fits for each in found.weights] == [pattern == "8:16"] and not found.unseen


def test_a_damaged_scale_is_named(tmp_path: Path) -> None:
    if session.library_path() is None:
        pytest.skip("the operator library is not built")
    export_onnx(layer(19, 22, "8:16").eval(), (torch.randn(3, 22),), tmp_path / "m.onnx")
    file = onnx.load(str(tmp_path / "m.onnx"))
    scales = next(each for each in file.graph.initializer if each.name == "scales")
    scales.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scales)[:-1], "scales"))
    onnx.save(file, str(tmp_path / "m.onnx"))
    with pytest.raises(sc.errors.FormatError, match=r"scales have shape \[18\], expected \[19\]"):
        onnx_session(tmp_path / "m.onnx", log_severity_level=4)
