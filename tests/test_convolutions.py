"""A network of convolutions through compile, plan, files and ONNX."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.compiler import report, summary
from sparsecomp.errors import FormatError, ModelError, PatternError
from sparsecomp.nn import SparseConv2d, SparseLinear


class Network(nn.Module):
    def __init__(self, last=False):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.reduce = nn.Conv2d(16, 32, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.wide = nn.Conv2d(32, 32, 3, padding=1)
        self.expand = nn.Conv2d(32, 64, 1)
        self.head = nn.Linear(64, 10)
        if last:
            self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = torch.relu(self.norm(self.reduce(torch.relu(self.stem(x)))))
        return self.head(self.expand(torch.relu(self.wide(x))).mean((-2, -1)))


def pruned(last=False, pattern="2:4"):
    torch.manual_seed(0)
    model = Network(last).eval()
    sc.prune(model, pattern, show_progress=False)
    return model


@pytest.mark.parametrize("last", [False, True])
def test_compile_swaps_1x1_convolutions_and_leaves_the_others(last, tmp_path):
    model = pruned(last)
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 9, 7)
    hooked = []
    model.expand.register_forward_hook(lambda *_: hooked.append(1))
    bias = model.expand.bias
    assert sc.compile(model, "2:4", where="everywhere") is model
    kinds = {name: type(each) for name, each in model.named_children()}
    assert (kinds["reduce"], kinds["expand"], kinds["head"]) == (SparseConv2d, SparseConv2d, SparseLinear)
    assert (kinds["stem"], kinds["wide"]) == (nn.Conv2d, nn.Conv2d)
    assert (model.reduce.stride, model.reduce.channels_last) == ((2, 2), last)
    torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)
    assert hooked
    assert model.expand.bias is bias
    told = " ".join(str(summary(model, batch=(1,))).split())
    assert "larger than 1x1 stays dense in execution" in told
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    sc.save(model, tmp_path / "model.safetensors")
    for into in (Network(last).eval(), copy.deepcopy(model)):
        loaded = sc.load(tmp_path / "model.safetensors", into)
        assert type(loaded.reduce) is SparseConv2d
        assert torch.equal(loaded(x), model(x))
        assert loaded.expand(torch.randn(1, 32, 4, 4)).stride() == dense.expand(torch.randn(1, 32, 4, 4)).stride()
    for name in ("reduce", "expand"):
        setattr(model, name, getattr(model, name).to_conv())
    model.head = model.head.to_linear()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_file_does_not_go_into_another_convolution(tmp_path):
    model = pruned()
    sc.compile(model, "2:4", where="everywhere")
    sc.save(model, tmp_path / "model.safetensors")
    other = Network()
    other.reduce = nn.Conv2d(16, 32, 1, padding=1, bias=False)
    with pytest.raises(FormatError, match='"reduce" has no place in the model: a padded 1x1 convolution'):
        sc.load(tmp_path / "model.safetensors", other)


def test_a_plan_has_1x1_convolutions_and_names_the_others():
    model = pruned()
    made = sc.plan(model, "2:4", batch=(16,), measure=False)
    assert [layer.name for layer in made] == ["reduce", "expand", "head"]
    assert set(made.skipped) == {"stem", "wide"}
    told = " ".join(str(made).split())
    assert "stem, wide" in told
    assert "larger than 1x1 stays dense in execution" in told
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.compile(model, made)
    assert report(model) is made
    assert all(isinstance(model.get_submodule(layer.name), SparseLinear) for layer in made if layer.choice)


def test_a_plan_and_pruning_leave_the_same_narrow_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1))
    made = sc.plan(model, ["2:4", "8:16"], batch=(16,), measure=False)
    assert [layer.name for layer in made] == ["1"]
    assert "3 input channels, fewer than the 4 columns that 2:4 judges" in made.skipped["0"]
    assert list(sc.prune(model, "2:4", show_progress=False).layers) == ["1"]
    sc.compile(model, "2:4", where="everywhere")
    assert [type(each) for each in model] == [nn.Conv2d, SparseConv2d]


def test_compile_prunes_what_it_packs():
    torch.manual_seed(0)
    model = Network().eval()
    dense, batch = copy.deepcopy(model), torch.randn(8, 3, 10, 10)
    calibration = sc.calibrate(model, [batch], show_progress=False)
    twin = copy.deepcopy(model)
    sc.prune(twin, "2:4", "wanda", calibration, only=["reduce", "expand", "head"], show_progress=False)
    sc.compile(model, "2:4", method="wanda", calibration=calibration, where="everywhere")
    torch.testing.assert_close(model(batch), twin(batch), rtol=1e-4, atol=1e-5)
    assert torch.equal(model.wide.weight, dense.wide.weight)


def test_weights_that_do_not_fit_and_models_without_such_layers_are_refused():
    with pytest.raises(PatternError, match="reduce: weight breaks 2:4"):
        sc.compile(Network(), "2:4", where="everywhere")
    with pytest.raises(ModelError, match=r"no layer that can be sparse .0: a convolution whose kernel is larger"):
        sc.compile(nn.Sequential(nn.Conv2d(8, 8, 3)), "2:4")


def test_the_model_itself_may_be_the_convolution(tmp_path):
    conv = nn.Conv2d(16, 8, 1)
    sc.prune(conv, "2:4", show_progress=False)
    layer = SparseConv2d.from_conv(conv, "2:4")
    sc.save(layer, tmp_path / "layer.safetensors")
    loaded, x = sc.load(tmp_path / "layer.safetensors", nn.Conv2d(16, 8, 1)), torch.randn(1, 16, 3, 4)
    assert torch.equal(loaded(x), layer(x))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [16, 18])
def test_an_exported_convolution_keeps_its_zeros_and_verifies(channels, tmp_path):
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 1, stride=2)
    ).eval()
    sc.prune(model, "2:4", show_progress=False)
    x = torch.randn(2, channels, 7, 6)
    path = tmp_path / "model.onnx"
    sc.export_onnx(model, (x,), path, form="dense")
    found = sc.verify_onnx(path, "2:4")
    assert [each.operator for each in found.weights] == ["Conv", "Conv"]
    assert found.fits, str(found)
    assert found.weights[0].density == pytest.approx(0.5, abs=0.06)
    session = sc.onnx_session(path)
    want = model(x).detach()
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model[0].weight[1, :4, 2, 1] = 1.0
    sc.export_onnx(model, (x,), path, form="dense")
    broken = sc.verify_onnx(path, "2:4")
    assert not broken.fits
    assert "row 16, group 0 (inputs 0 to 3): 4 nonzeros" in broken.weights[0].reason


@pytest.mark.slow
@pytest.mark.parametrize("form", ["packed", "dense"])
def test_a_compiled_convolution_is_exported(form, tmp_path):
    pytest.importorskip("onnx")
    model = pruned()
    sc.compile(model, "2:4", where="everywhere")
    x = torch.randn(2, 3, 9, 7)
    sc.export_onnx(model, (x,), tmp_path / "model.onnx", form=form)
    session = sc.onnx_session(tmp_path / "model.onnx")
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-5)
    found = sc.verify_onnx(tmp_path / "model.onnx", "2:4")
    # the first convolution has 3 input channels and stays dense
    assert [each.fits for each in found.weights] == [False, *[True] * (len(found.weights) - 1)]
    assert type(model.expand) is SparseConv2d
