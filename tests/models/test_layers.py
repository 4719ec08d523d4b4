import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from sparsecomp.errors import ModelError
from sparsecomp.files.storage import load, save
from sparsecomp.models.layers import find_linears, replace_layer, require_layers


class Conv1D(nn.Module):
    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class Packed(nn.Module):
    """Stands for a sparse layer: it is marked as one and has no ``weight``."""

    _sparsecomp_packed = True

    def __init__(self, linear):
        super().__init__()
        self.inner = [linear]

    def packed(self):
        return None

    def forward(self, x):
        return self.inner[0](x)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


def two_mlps():
    return nn.ModuleDict({"first": Mlp(), "second": Mlp()})


def test_names_come_in_the_order_of_the_model_and_as_plain_linears():
    table = find_linears(two_mlps())
    assert list(table) == ["first.up", "first.down", "second.up", "second.down"]
    assert table.skipped == {}
    up = table["first.up"]
    assert (up.kind, up.shape, up.dtype) == ("linear", (10, 6), torch.float32)
    assert up.as_linear() is up.module


def test_only_and_skip_are_globs_and_what_they_leave_out_is_named():
    table = find_linears(two_mlps(), only=["first.*", "*.up"], skip="second.up")
    assert list(table) == ["first.up", "first.down"]
    assert table.skipped == {"second.up": 'excluded by skip "second.up"', "second.down": "not selected by only"}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("frist.up", r'only "frist.up" matches no layer; the nearest are "first.up"'),
        ("first", r'only "first" matches no layer; did you mean "first.\*"\?'),
        ("zzz", r'only "zzz" matches no layer; there are "first.up", "first.down", "second.up", ...'),
    ],
)
def test_a_glob_that_matches_nothing_names_the_nearest(only, message):
    with pytest.raises(ModelError, match=message):
        find_linears(two_mlps(), only=only)


def test_a_glob_may_name_a_layer_that_is_skipped_anyway():
    model = nn.ModuleDict({"head": Doubling(4, 4), "body": nn.Linear(4, 4)})
    assert list(find_linears(model, skip=["head"])) == ["body"]


def test_a_model_that_is_itself_the_layer():
    linear = nn.Linear(4, 4)
    assert list(find_linears(linear)) == [""]
    with pytest.raises(ModelError, match="the model itself is the layer"):
        replace_layer(linear, "", nn.Linear(4, 4))


@pytest.mark.parametrize("source", ["look-alike", "transformers"])
def test_conv1d_is_found_transposed(source):
    cls = Conv1D if source == "look-alike" else pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(cls(10, 6))
    layer = find_linears(model)["0"]
    parameter = model[0].weight
    assert (layer.kind, layer.shape) == ("conv1d", (10, 6))
    x = torch.randn(3, 6)
    torch.testing.assert_close(x @ layer.get_weight().T + model[0].bias, model(x))
    linear = layer.as_linear()
    torch.testing.assert_close(linear(x), model(x))
    assert linear.bias is model[0].bias
    new = torch.randn(10, 6)
    layer.set_weight(new)
    assert model[0].weight is parameter
    assert torch.equal(parameter, new.T)
    assert torch.equal(linear.weight, new), "as_linear is a view of the same memory"


def test_conv1d_of_another_library_is_not_taken_for_it():
    other = type("Conv1D", (Conv1D,), {"__module__": "elsewhere"})
    other.__mro__[1].__module__ = "elsewhere"
    try:
        assert list(find_linears(nn.Sequential(other(4, 4)))) == []
    finally:
        Conv1D.__module__ = "transformers.pytorch_utils"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_set_weight_keeps_the_parameter(dtype):
    linear = nn.Linear(6, 4).to(dtype)
    linear.weight.requires_grad_(False)
    layer, parameter = find_linears(nn.Sequential(linear))["0"], linear.weight
    layer.set_weight(torch.full((4, 6), 0.5))
    assert linear.weight is parameter
    assert (parameter.dtype, parameter.requires_grad) == (dtype, False)
    assert bool((parameter == 0.5).all())
    with pytest.raises(ModelError, match=r"0: got a weight of shape \(6, 4\); the layer takes \[out, in\] = \(4, 6\)"):
        layer.set_weight(torch.zeros(6, 4))


def quantised():
    return torch.ao.nn.quantized.dynamic.Linear(4, 4)


def normalised():
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))


def masked():
    linear = nn.Linear(4, 4)
    torch_prune.l1_unstructured(linear, "weight", 0.5)
    return linear


def of_bytes():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


def patched():
    linear = nn.Linear(4, 4)
    linear.forward = lambda x: x
    return linear


class OddParameter(nn.Parameter):
    pass


def subclassed_weight():
    linear = nn.Linear(4, 4)
    linear.weight = OddParameter(torch.zeros(4, 4))
    return linear


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(4, 6, 8))
        self.position = nn.Parameter(torch.zeros(1, 5, 8))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubling(4, 4), "Doubling has a forward of its own"),
        (normalised, "computed by a parametrization; make it permanent first, with torch.nn.utils.parametrize"),
        (masked, 'torch.nn.utils.prune.remove(layer, "weight")'),
        (lambda: nn.Linear(4, 4, device="meta"), "on the meta device"),
        (lambda: nn.LazyLinear(4), "no shape yet"),
        (of_bytes, "its weight is int8; allowed are float32, float16, bfloat16, float64"),
        (patched, "its forward was replaced"),
        (subclassed_weight, "its weight is a OddParameter"),
        (quantised, "quantised or custom"),
        (lambda: Packed(nn.Linear(4, 4)), "already sparse"),
        (lambda: nn.Conv2d(3, 4, 3), "larger than 1x1 stays dense in execution; sc.prune can give it zeros"),
        (lambda: nn.Conv2d(4, 4, 1, padding=1), "a padded 1x1 convolution stays dense in execution"),
        (lambda: nn.Conv2d(4, 8, 1, groups=4), "a depthwise convolution (groups=4) stays dense"),
        (lambda: nn.Conv3d(3, 4, 3), "Conv3d layers stay dense"),
        (lambda: nn.LSTM(3, 4), "LSTM layers stay dense"),
        (Experts, "holds stacks of matrices (gate_up; 76.2% of the model's weights); if it multiplies by them"),
    ],
)
def test_what_cannot_be_sparse_is_skipped_with_the_reason(make, reason):
    table = find_linears(nn.Sequential(make(), nn.Linear(4, 4)))
    assert list(table) == ["1"]
    assert reason in table.skipped["0"]


def test_a_subclass_with_the_same_forward_is_found():
    cls = type("Named", (nn.Linear,), {})
    assert list(find_linears(nn.Sequential(cls(4, 4)))) == ["0"]


def test_no_layer_at_all_says_why():
    with pytest.raises(
        ModelError, match=r"no layer that can be sparse .0: a convolution whose kernel .*; allowed are nn.Linear"
    ):
        require_layers(find_linears(nn.Sequential(nn.Conv2d(3, 4, 3))))


@pytest.mark.parametrize("refuse", [find_linears, lambda model: save(model, "m"), lambda model: load("m", model)])
def test_what_is_no_model_is_named(refuse):
    with pytest.raises(ModelError, match=r"the model is a dict; allowed is an nn\.Module"):
        refuse({})


@pytest.mark.parametrize("tie", ["object", "memory", "transposed"])
def test_weights_shared_with_another_module_are_skipped(tie):
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "body": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    weight = model["embedding"].weight
    shared = {"object": weight, "memory": nn.Parameter(weight.data), "transposed": nn.Parameter(weight.data.T)}[tie]
    model["head"].weight = shared
    table = find_linears(model)
    assert list(table) == ["body"]
    assert table.skipped["head"] == 'its weight is shared with "embedding.weight"'


def test_the_same_module_under_two_names_is_found_once_and_replaced_everywhere():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    table = find_linears(model)
    assert list(table) == ["a"]
    assert table["a"].aliases == ("b.0",)
    assert table.skipped == {"b.0": 'the same layer as "a"'}
    assert list(find_linears(model, only="b.*")) == ["a"]
    assert list(find_linears(model, skip="b.*")) == []
    new = nn.Linear(4, 4)
    replace_layer(model, "b.0", new)
    assert model["a"] is new
    assert model["b"][0] is new


def test_replacing_keeps_the_training_mode_and_refuses_unknown_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    new = nn.Linear(4, 4)
    replace_layer(model, "1", new)
    assert not new.training
    with pytest.raises(ModelError, match='layer "7" matches no layer'):
        replace_layer(model, "7", new)
    with pytest.raises(ModelError, match="is a glob"):
        replace_layer(model, "*", new)


def test_multihead_attention_is_skipped_with_reasons_and_not_replaced():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 8)})
    table = find_linears(model)
    assert list(table) == ["out"]
    assert "fused kernel" in table.skipped["attention.in_proj_weight"]
    assert "reads its weight and never calls it" in table.skipped["attention.out_proj"]
    with pytest.raises(ModelError, match="reads its weight"):
        replace_layer(model, "attention.out_proj", nn.Linear(8, 8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [False, True])
def test_layers_of_a_transformer_encoder_are_called_once_replaced(nested):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    dense = copy.deepcopy(model)
    table = find_linears(model)
    assert list(table) == ["layers.0.linear1", "layers.0.linear2", "layers.1.linear1", "layers.1.linear2"]
    # the second layer: the fused path of the first would hand it nested tensors, were they not turned off
    replace_layer(model, "layers.1.linear1", Packed(copy.deepcopy(model.layers[1].linear1)))
    x = torch.randn(3, 5, 8)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    if nested:
        padding[1, 3:] = True
    with torch.no_grad():
        got = model(x, src_key_padding_mask=padding if nested else None)
        want = dense(x, src_key_padding_mask=padding if nested else None)
    torch.testing.assert_close(got[~padding], want[~padding])
