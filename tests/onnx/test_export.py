"""Exported files against the model: checker, reference evaluator and stock ONNX Runtime."""

import onnx
import pytest
import torch
from torch import nn

from sparsecomp.errors import BackendError, FormatError, ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx import export, export_onnx
from sparsecomp.onnx.function import FLOATS, operator
from tests.onnx.onnx_models import Mixed, assert_close, random_sparse_layer, run_reference, run_stock, torch_output

pytestmark = pytest.mark.slow  # every test exports a model

PATTERNS = ["2:4", "1:4", "3:8", "8:16", "5:16", "1:2", "2:2", "2:4@v4", "3:8@v5", "8:2:8"]


def checked(path):
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    return model


def operators(model):
    return [node.op_type for node in model.graph.node]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_layers_of_every_geometry(tmp_path, pattern):
    # 19 and 22 are ragged for every M but 2; 9 rows leave a part of a shared mask
    net = nn.Sequential(
        random_sparse_layer(19, 22, pattern, seed=3), nn.ReLU(), random_sparse_layer(9, 19, pattern, bias=False, seed=4)
    )
    report = export_onnx(net, (torch.randn(3, 22),), tmp_path / "m.onnx")
    assert operators(checked(tmp_path / "m.onnx")) == ["NMLinear", "Relu", "NMLinear"]
    assert [layer.form for layer in report.layers] == ["packed", "packed"]
    for batch in (1, 3, 8):
        x = torch.randn(batch, 22)
        want = torch_output(net, x)
        assert_close(run_reference(tmp_path / "m.onnx", x.numpy()), want)
        assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), want)


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:onnx.reference")
def test_activations(tmp_path, activation, dtype, form):
    net = nn.Sequential(
        random_sparse_layer(19, 22, "2:4", seed=3, dtype=dtype, activation=activation),
        random_sparse_layer(9, 19, "2:4", seed=4, dtype=dtype),
    )
    export_onnx(net, (torch.randn(3, 22).to(dtype),), tmp_path / "m.onnx", form=form)
    model = checked(tmp_path / "m.onnx")
    if form == "packed":
        assert operators(model) == [operator(FLOATS, activation), operator(FLOATS, "none")]
        assert {function.name for function in model.functions} == set(operators(model))
    x = torch.randn(8, 22).to(dtype)
    assert_close(run_reference(tmp_path / "m.onnx", x.numpy()), torch_output(net, x), dtype)
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(net, x), dtype)


@pytest.mark.parametrize("opset", [18, 23])
def test_opsets(tmp_path, opset):
    net = random_sparse_layer(19, 22, "3:8@v5", seed=3, activation="gelu")
    export_onnx(net, (torch.randn(3, 22),), tmp_path / "m.onnx", opset=opset)
    model = checked(tmp_path / "m.onnx")
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [opset]
    x = torch.randn(5, 22)
    assert_close(run_reference(tmp_path / "m.onnx", x.numpy()), torch_output(net, x))
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(net, x))


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_model_with_a_sequence_axis(tmp_path, form):
    net = Mixed()
    axes = {"x": {0: "batch", 1: "sequence"}}
    export_onnx(
        net,
        (torch.randn(2, 5, 22),),
        tmp_path / "m.onnx",
        form=form,
        dynamic_shapes=axes,
        input_names=["x"],
        output_names=["y"],
    )
    model = checked(tmp_path / "m.onnx")
    assert operators(model).count("NMLinear") == (3 if form == "packed" else 0)
    assert [dim.dim_param for dim in model.graph.input[0].type.tensor_type.shape.dim[:2]] == ["batch", "sequence"]
    assert model.graph.output[0].name == "y"
    net.eval()
    for shape in ((1, 1, 22), (2, 5, 22), (4, 3, 22)):
        x = torch.randn(shape)
        want = torch_output(net, x)
        assert_close(run_reference(tmp_path / "m.onnx", x.numpy()), want)
        assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.filterwarnings("ignore:m.onnx. ONNX Runtime cannot load:RuntimeWarning")
def test_sixteen_bit_weights(tmp_path, form, dtype):
    import ml_dtypes
    import numpy as np

    net = Mixed("3:8", dtype).eval()
    export_onnx(net, (torch.randn(2, 22).to(dtype),), tmp_path / "m.onnx", form=form)
    checked(tmp_path / "m.onnx")
    x = torch.randn(4, 22).to(dtype)
    array = x.float().numpy().astype(np.float16 if dtype == torch.float16 else ml_dtypes.bfloat16)
    want = torch_output(net, x)
    assert_close(run_reference(tmp_path / "m.onnx", array), want, dtype)
    if dtype == torch.float16:  # its CPU provider has no bfloat16 MatMul
        assert_close(run_stock(tmp_path / "m.onnx", array), want, dtype)


def test_dense_form_is_named_weights_with_zeros(tmp_path):
    net = Mixed()
    report = export_onnx(net, (torch.randn(2, 22),), tmp_path / "m.onnx", form="dense")
    weights = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in checked(tmp_path / "m.onnx").graph.initializer
    }
    assert (weights["up.weight"] == net.up.to_linear().weight.detach().numpy().T).all()
    assert all(layer.form == "dense" and layer.nbytes == layer.dense_nbytes for layer in report.layers)


def test_blocks_are_written_dense_and_said_so(tmp_path):
    net = nn.Sequential(random_sparse_layer(16, 24, "block4x8:0.5"), random_sparse_layer(8, 16, "2:4")).eval()
    report = export_onnx(net, (torch.randn(2, 24),), tmp_path / "m.onnx")
    assert [(layer.form, layer.note) for layer in report.layers] == [
        ("dense", "block4x8:0.5 has no packed node"),
        ("packed", ""),
    ]
    assert "packed node" in str(report)
    checked(tmp_path / "m.onnx")
    x = torch.randn(5, 24)
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(net, x))


def test_the_file_stays_compressed(tmp_path):
    layer = random_sparse_layer(256, 512, "2:4")
    packed = export_onnx(layer, (torch.randn(2, 512),), tmp_path / "packed.onnx")
    dense = export_onnx(layer, (torch.randn(2, 512),), tmp_path / "dense.onnx", form="dense")
    assert packed.nbytes == (tmp_path / "packed.onnx").stat().st_size
    bias = 4 * 256
    assert 0 < packed.nbytes - layer.packed().nbytes - bias < 12_000
    assert packed.nbytes < 0.56 * dense.nbytes
    assert packed.external_data is None
    stored = {
        entry.name: onnx.numpy_helper.to_array(entry) for entry in checked(tmp_path / "packed.onnx").graph.initializer
    }
    assert (stored["values"] == layer.packed().values.numpy()).all()
    assert (stored["metadata"] == layer.packed().metadata.numpy()).all()


def test_a_fixed_batch(tmp_path):
    net = random_sparse_layer(8, 16, "2:4")
    export_onnx(net, (torch.randn(1, 16),), tmp_path / "m.onnx", dynamic_batch=False)
    dims = checked(tmp_path / "m.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [1, 16]


def test_keyword_inputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = random_sparse_layer(8, 16, "2:4")

        def forward(self, left=None, right=None):
            return self.layer(left) * right

    net = Two()
    inputs = {"left": torch.randn(3, 16), "right": torch.randn(3, 8)}
    export_onnx(net, (), tmp_path / "m.onnx", kwargs=inputs)
    checked(tmp_path / "m.onnx")
    left, right = torch.randn(6, 16), torch.randn(6, 8)
    assert_close(run_stock(tmp_path / "m.onnx", left.numpy(), right.numpy()), torch_output(net, left, right))
    with pytest.raises(ModelError, match="positional and keyword"):
        export_onnx(net, (inputs["left"],), tmp_path / "m.onnx", kwargs={"right": inputs["right"]})


def state_of(model):
    return [(name, id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)]


def test_the_model_is_left_as_it_was(tmp_path):
    net = Mixed().train()
    net.down.eval()
    before = state_of(net)
    export_onnx(net, (torch.randn(2, 22),), tmp_path / "m.onnx")
    assert state_of(net) == before
    assert isinstance(net.twice, SparseLinear)
    assert net.twice is net.also


def test_the_model_is_restored_after_an_error(tmp_path):
    class Refuses(Mixed):
        def forward(self, x):
            if x.sum() > 0:  # a branch on data, which torch.export refuses
                return self.up(x)
            return self.down(self.up(x))

    net = Refuses()
    before = state_of(net)
    with pytest.raises(ModelError, match="torch cannot export"):
        export_onnx(net, (torch.randn(2, 22),), tmp_path / "m.onnx")
    assert state_of(net) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [({"form": "sparse"}, 'use "packed" or "dense"'), ({"opset": 17}, "use 18 or newer")],
)
def test_what_export_refuses(tmp_path, options, message):
    with pytest.raises(ModelError, match=message):
        export_onnx(random_sparse_layer(4, 8, "2:4"), (torch.randn(2, 8),), tmp_path / "m.onnx", **options)


@pytest.mark.parametrize("argument", ["input_names", "output_names"])
def test_names_that_nothing_bears_are_refused(tmp_path, argument):
    layer, x = random_sparse_layer(4, 8, "2:4"), torch.randn(2, 8)
    export_onnx(layer, (x,), tmp_path / "m.onnx", **{argument: ["one"]})
    graph = checked(tmp_path / "m.onnx").graph
    assert "one" in [value.name for value in (*graph.input, *graph.output)]
    with pytest.raises(ModelError, match=f"{argument} has 2 names, but the model has 1"):
        export_onnx(layer, (x,), tmp_path / "m.onnx", **{argument: ["one", "two"]})


def test_a_missing_folder_and_what_is_no_model_are_named(tmp_path):
    with pytest.raises(FormatError, match=r'there is no folder ".*missing"; make it first'):
        export_onnx(nn.Linear(4, 4), (torch.randn(2, 4),), tmp_path / "missing" / "m.onnx")
    with pytest.raises(ModelError, match="the model is a str"):
        export_onnx("model", (torch.randn(2, 4),), tmp_path / "m.onnx")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx_ir", None)
    with pytest.raises(BackendError, match=r'pip install "sparsecomp\[onnx\]"'):
        export_onnx(random_sparse_layer(4, 8, "2:4"), (torch.randn(2, 8),), tmp_path / "m.onnx")


def test_weights_beyond_one_protobuf_go_to_external_data(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PROTOBUF_LIMIT", 10_000)
    net = random_sparse_layer(64, 128, "2:4")
    with pytest.warns(UserWarning, match="keep both together"):
        report = export_onnx(net, (torch.randn(2, 128),), tmp_path / "m.onnx")
    assert report.external_data == tmp_path / "m.onnx.data"
    assert report.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    x = torch.randn(4, 128)
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(net, x))
