"""What is traced with a sparse layer: hooks, forwards of its own, whatever a model reads from it."""

from pathlib import Path

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.errors import ModelError
from sparsecomp.nn import SparseLinear
from sparsecomp.onnx import export_onnx, exportable
from tests.onnx.onnx_models import assert_close, random_sparse_layer, run_stock, torch_output

pytestmark = pytest.mark.slow  # every test exports a model


class Scaled(SparseLinear):
    """A subclass with a parameter, a buffer and a forward of its own."""

    def forward(self, x):
        return super().forward(x) * self.gain + self.shift


def net():
    first, last = random_sparse_layer(26, 22, "2:4"), random_sparse_layer(10, 26, "2:4", bias=False)
    return nn.Sequential(first, nn.ReLU(), last).eval()


def with_output_hook():
    model = net()
    model[0].register_forward_hook(lambda layer, args, y: y * 2 + layer.in_features)
    return model


def with_input_hooks():
    model = net()
    model[0].register_forward_pre_hook(lambda layer, args: (args[0] + 1,))
    model[2].register_forward_pre_hook(lambda layer, args, named: ((args[0] * 3,), named), with_kwargs=True)
    return model


def with_a_hook_that_reads_the_weight():
    model = net()
    model[2].register_forward_hook(lambda layer, args, y: y.to(layer.weight.dtype) + layer.weight.sum())
    return model


def with_hooks_of_other_modules():
    model = net()
    model.register_forward_hook(lambda module, args, y: y + 5)
    model[1].register_forward_hook(lambda module, args, y: y + 7)
    return model


def with_a_subclass():
    model = net()
    model[0].__class__ = Scaled
    model[0].gain = nn.Parameter(torch.tensor(3.0))
    model[0].register_buffer("shift", torch.ones(26))
    return model


def with_a_wrapped_forward():
    model = net()
    original = model[0].forward
    model[0].forward = lambda x: original(x) * 7
    return model


def with_a_parametrised_bias():
    class Doubled(nn.Module):
        def forward(self, bias):
            return bias * 2

    model = net()
    nn.utils.parametrize.register_parametrization(model[0], "bias", Doubled())
    return model


def compiled():
    return torch.compile(net())


def a_single_layer():
    layer = random_sparse_layer(10, 22, "2:4")
    layer.register_forward_hook(lambda module, args, y: y - 1)
    return layer


MODELS = [
    with_output_hook,
    with_input_hooks,
    with_a_hook_that_reads_the_weight,
    with_hooks_of_other_modules,
    with_a_subclass,
    with_a_wrapped_forward,
    with_a_parametrised_bias,
    compiled,
    a_single_layer,
]


def state_of(model):
    return [
        (name, id(module), type(module), list(vars(module)), list(module._buffers), list(module._parameters))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_the_file_does_what_the_model_does(tmp_path, build, form):
    model = build()
    before = state_of(model)
    report = export_onnx(model, (torch.randn(3, 22),), tmp_path / "m.onnx", form=form)
    assert {layer.form for layer in report.layers} == {form}
    assert state_of(model) == before
    x = torch.randn(5, 22)
    want = torch_output(getattr(model, "_orig_mod", model), x)
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), want)


def test_a_hook_that_cannot_be_traced_is_named_with_its_layer(tmp_path):
    model = net()
    model[0].register_forward_hook(lambda layer, args, y: y * 2 if y.sum() > 0 else y)
    with pytest.raises(ModelError, match=r'branches on the values of a tensor.*the hooks on "0" are traced'):
        export_onnx(model, (torch.randn(3, 22),), tmp_path / "m.onnx")


def test_what_a_hook_leaves_on_its_layer_while_tracing_is_taken_away(tmp_path):
    model = net()

    def keep(layer, args, y):
        layer.last = y

    model[0].register_forward_hook(keep)
    x = torch.randn(3, 22)
    model(x)
    last = model[0].last
    export_onnx(model, (x,), tmp_path / "m.onnx")
    assert model[0].last is last


def test_a_wrong_width_is_refused_though_a_node_takes_any(tmp_path):
    with pytest.raises(ModelError, match=r"input has shape .*20\); this layer takes \[\.\.\., 22\]"):
        export_onnx(net(), (torch.randn(3, 20),), tmp_path / "m.onnx")


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_layer_keeps_its_dtype_under_autocast(tmp_path, form):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.sparse = nn.Linear(8, 22), random_sparse_layer(10, 22, "2:4")

        def forward(self, x):
            with torch.autocast("cpu", torch.float16):
                return self.sparse(self.dense(x)).float()

    model = Mixed().eval()
    export_onnx(model, (torch.randn(3, 8),), tmp_path / "m.onnx", form=form)
    x = torch.randn(4, 8)
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(model, x), torch.float16)


@pytest.mark.parametrize(
    ("device", "dtype"), [("meta", torch.float32), ("cpu", torch.float64), ("cpu", torch.float16)], ids=str
)
@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_defaults_of_torch_do_not_matter(tmp_path, device, dtype, form, activation):
    model = nn.Sequential(
        random_sparse_layer(12, 22, "2:4", activation=activation),
        nn.LayerNorm(12),
        nn.GELU(),
        random_sparse_layer(10, 12, "3:8", bias=False),
    ).eval()
    x, y = torch.randn(3, 22), torch.randn(5, 22)
    want = torch_output(model, y)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            export_onnx(model, (x,), tmp_path / "m.onnx", form=form)
    finally:
        torch.set_default_dtype(before)
    got = run_stock(tmp_path / "m.onnx", y.numpy())
    assert got.dtype == want.dtype
    assert_close(got, want)


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_another_exporter_can_take_the_model_while_it_is_exportable(tmp_path, dynamo):
    model, x = with_output_hook(), torch.randn(3, 22)
    before = state_of(model)
    with exportable(model, "dense") as layers:
        torch.onnx.export(model, (x,), tmp_path / "m.onnx", dynamo=dynamo, verbose=False)
    assert state_of(model) == before
    assert [(layer.name, layer.form) for layer in layers] == [("0", "dense"), ("2", "dense")]
    assert_close(run_stock(tmp_path / "m.onnx", x.numpy()), torch_output(model, x))
    with pytest.raises(ModelError, match='use "packed" or "dense"'), exportable(model, "sparse"):
        pass


def test_torchs_own_export_is_told_where_to_go(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    sc.compile(model, "2:4", method="magnitude", where="everywhere")
    for dynamo in (True, False):
        with pytest.warns(UserWarning, match=r"sparsecomp\.export_onnx.*exportable"), pytest.raises(Exception):  # noqa: B017
            torch.onnx.export(model, (torch.randn(2, 16),), tmp_path / "m.onnx", dynamo=dynamo)
