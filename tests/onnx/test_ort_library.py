"""The operator library in the installed ONNX Runtime: it is registered, it runs, and it is right."""

import ctypes
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from sparsecomp.errors import BackendError, FormatError
from sparsecomp.onnx import export_onnx, onnx_session, session
from tests.onnx.onnx_models import Mixed, assert_close, random_sparse_layer, run_session, torch_output

needs_library = pytest.mark.skipif(session.library_path() is None, reason="the operator library is not built")


@pytest.fixture
def quiet():
    """The warning that the session is a stock one becomes an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bytes of a file with one packed layer [8, 16]."""
    path = tmp_path_factory.mktemp("exported") / "m.onnx"
    export_onnx(random_sparse_layer(8, 16, "2:4"), (torch.randn(2, 16),), path)
    return path.read_bytes()


def runs():
    function = ctypes.CDLL(str(session.library_path())).sparsecomp_ort_runs
    function.restype = ctypes.c_int64
    return function()


@needs_library
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("pattern", ["2:4", "3:8", "5:16", "1:2", "3:8@v5", "8:2:8"])
def test_our_kernel_runs_and_is_right(tmp_path, pattern):
    net = Mixed(pattern).eval()
    axes = {"x": {0: "batch", 1: "sequence"}}
    export_onnx(net, (torch.randn(2, 3, 22),), tmp_path / "m.onnx", dynamic_shapes=axes)
    optimised = tmp_path / "optimised.onnx"
    fast = onnx_session(tmp_path / "m.onnx", optimized_model_filepath=str(optimised), log_severity_level=3)
    operators = [node.op_type for node in onnx.load(str(optimised)).graph.node]
    assert operators.count("NMLinear") == 3
    for shape in ((1, 1, 22), (2, 3, 22), (5, 7, 22), (0, 3, 22)):
        x = torch.randn(shape)
        before = runs()
        assert_close(run_session(fast, x.numpy()), torch_output(net, x))
        assert runs() - before == 3


@needs_library
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
def test_activations_run_in_our_kernel(tmp_path, activation, dtype):
    net = random_sparse_layer(90, 22, "2:4", activation=activation, dtype=dtype)
    export_onnx(net, (torch.randn(2, 22).to(dtype),), tmp_path / "m.onnx")
    x, fast, before = torch.randn(70, 22).to(dtype), onnx_session(tmp_path / "m.onnx"), runs()
    assert_close(run_session(fast, x.numpy()), torch_output(net, x), dtype)
    assert runs() - before == 1


@needs_library
@pytest.mark.usefixtures("quiet")
def test_sixteen_bit_weights(tmp_path):
    net = random_sparse_layer(18, 22, "2:4", dtype=torch.float16)
    export_onnx(net, (torch.randn(2, 22).half(),), tmp_path / "half.onnx")
    x = torch.randn(5, 22).half()
    before = runs()
    got = run_session(onnx_session(tmp_path / "half.onnx"), x.numpy())
    assert runs() - before == 1
    assert_close(got, torch_output(net, x), torch.float16)

    import onnxruntime

    net = random_sparse_layer(18, 22, "2:4", dtype=torch.bfloat16)
    export_onnx(net, (torch.randn(2, 22).bfloat16(),), tmp_path / "bf16.onnx")
    x = torch.randn(5, 22).bfloat16()
    fast = onnx_session(tmp_path / "bf16.onnx")
    words = x.view(torch.int16).numpy().view(np.uint16)
    value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(words, onnx.TensorProto.BFLOAT16)
    binding = fast.io_binding()
    binding.bind_ortvalue_input(fast.get_inputs()[0].name, value)
    result = torch.empty(5, 18, dtype=torch.bfloat16)
    binding.bind_output(
        fast.get_outputs()[0].name, "cpu", 0, onnx.TensorProto.BFLOAT16, tuple(result.shape), result.data_ptr()
    )
    before = runs()
    fast.run_with_iobinding(binding)
    assert runs() - before == 1
    assert_close(result.float().numpy(), torch_output(net, x), torch.bfloat16)


@needs_library
@pytest.mark.usefixtures("quiet")
def test_profiling_names_our_operator(tmp_path):
    net = random_sparse_layer(8, 16, "2:4")
    export_onnx(net, (torch.randn(2, 16),), tmp_path / "m.onnx")
    fast = onnx_session(tmp_path / "m.onnx", enable_profiling=True, profile_file_prefix=str(tmp_path / "profile"))
    run_session(fast, np.zeros((2, 16), dtype=np.float32))
    events = json.loads(Path(fast.end_profiling()).read_text())
    assert "NMLinear" in {event.get("args", {}).get("op_name") for event in events}


@needs_library
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("threads", [0, 1, 2])
def test_threads_change_nothing(tmp_path, threads):
    # weights of one and of several slices, the last one short; batches below and above the size that is cut
    net = nn.Sequential(
        random_sparse_layer(330, 70, "2:4"),
        random_sparse_layer(33, 330, "8:16"),
        random_sparse_layer(171, 33, "3:8@v5"),
    )
    export_onnx(net, (torch.randn(2, 70),), tmp_path / "m.onnx")
    fast = onnx_session(tmp_path / "m.onnx", intra_op_num_threads=threads)
    for batch in (1, 65, 257):
        x = torch.randn(batch, 70)
        assert_close(run_session(fast, x.numpy()), torch_output(net, x))


def edited(exported, path, change):
    model = onnx.load_from_string(exported)
    change(model.graph)
    onnx.save(model, str(path))
    return path


def set_attribute(name, value):
    def change(graph):
        next(entry for entry in graph.node[0].attribute if entry.name == name).i = value

    return change


@needs_library
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_attribute("n", 1), "values have shape"),
        (set_attribute("in_features", 24), "values have shape"),
        (set_attribute("mask_rows", 2), "metadata has shape"),
        (set_attribute("index_bits", 3), "index_bits does not fit m"),
        (set_attribute("m", 2**40), "attribute m is out of range"),
        (set_attribute("m", 5), "describe no N:M weight"),
    ],
)
def test_errors_of_the_kernel_reach_the_user(exported, tmp_path, change, message):
    with pytest.raises(FormatError, match=message):
        onnx_session(edited(exported, tmp_path / "m.onnx", change), log_severity_level=4)


@needs_library
@pytest.mark.usefixtures("quiet")
def test_a_weight_without_rows(exported, tmp_path):
    def empty(graph):
        for entry in graph.initializer:
            entry.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(entry)[:0], entry.name))
        graph.output[0].type.tensor_type.shape.dim[1].dim_value = 0

    fast = onnx_session(edited(exported, tmp_path / "m.onnx", empty))
    assert run_session(fast, np.zeros((2, 16), dtype=np.float32)).shape == (2, 0)


@needs_library
@pytest.mark.usefixtures("quiet")
def test_weights_must_be_constant(exported, tmp_path):
    def computed(graph):
        values = next(entry for entry in graph.initializer if entry.name == "values")
        graph.input.append(onnx.helper.make_tensor_value_info("values", values.data_type, list(values.dims)))

    with pytest.raises(FormatError, match="must be initialisers"):
        onnx_session(edited(exported, tmp_path / "m.onnx", computed), log_severity_level=4)


@needs_library
@pytest.mark.usefixtures("quiet")
def test_a_wrong_input_is_an_error_not_a_crash(exported, tmp_path):
    def wider(graph):
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 17

    fast = onnx_session(edited(exported, tmp_path / "m.onnx", wider), log_severity_level=4)
    with pytest.raises(Exception, match=r"x has shape \[2, 17\]; its last dimension must be 16"):
        run_session(fast, np.zeros((2, 17), dtype=np.float32))


def test_without_the_library_the_session_is_stock_and_says_so(tmp_path, monkeypatch):
    net = random_sparse_layer(8, 16, "2:4")
    export_onnx(net, (torch.randn(2, 16),), tmp_path / "m.onnx")
    x = torch.randn(3, 16)
    (tmp_path / "libempty.so").write_bytes(b"no library")
    for library in (None, tmp_path / "libempty.so"):
        monkeypatch.setattr(session, "library_path", lambda library=library: library)
        with pytest.warns(RuntimeWarning, match="packed layers run dense"):
            stock = onnx_session(tmp_path / "m.onnx")
        assert_close(run_session(stock, x.numpy()), torch_output(net, x))


@needs_library
def test_options_and_providers(exported, tmp_path):
    (tmp_path / "m.onnx").write_bytes(exported)
    made = onnx_session(tmp_path / "m.onnx", providers=["CPUExecutionProvider"], intra_op_num_threads=1)
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert made.get_session_options().intra_op_num_threads == 1
    with pytest.raises(BackendError, match=r'no attribute "intra_threads"; did you mean one of .*intra_op_num_threads'):
        onnx_session(tmp_path / "m.onnx", intra_threads=1)
    with pytest.raises(BackendError, match="intra_op_num_threads does not take 'many'"):
        onnx_session(tmp_path / "m.onnx", intra_op_num_threads="many")
    with pytest.raises(FormatError, match="is not a file"):
        onnx_session(tmp_path / "gone.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(FormatError, match="cannot load"):
        onnx_session(tmp_path / "text.onnx")


def of_a_later_version(model):
    model.ir_version = 99


def of_a_later_opset(model):
    model.opset_import[0].version = 99


def with_a_foreign_node(model):
    model.graph.node[0].domain = "other"
    model.opset_import.append(onnx.helper.make_opsetid("other", 1))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (of_a_later_version, "update onnxruntime"),
        (of_a_later_opset, "or export with a lower opset"),
        (with_a_foreign_node, "register that library as well"),
        (None, "keep both in one folder"),
        (0, "cut short; export it again"),
    ],
)
def test_the_advice_fits_what_is_wrong_with_the_file(tmp_path, change, advice):
    export_onnx(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "m.onnx")
    model, path = onnx.load(tmp_path / "m.onnx"), tmp_path / "wrong.onnx"
    if change:
        change(model)
    onnx.save_model(model, path, save_as_external_data=change is None, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink(missing_ok=True)
    if change == 0:
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(FormatError, match=advice):
        onnx_session(path, log_severity_level=4)
