import copy
import io
import pickle

import pytest
import torch
from torch import nn

import sparsecomp as sc
from sparsecomp.errors import ModelError, PatternError
from sparsecomp.nn import SparseConv2d


def convolution(channels=16, out=24, pattern="2:4", **settings):
    """A convolution that fits the pattern."""
    model = nn.Sequential(nn.Conv2d(channels, out, 1, **settings))
    sc.prune(model, pattern, show_progress=False)
    return model[0]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "part": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("size", [(2, 7, 5), (1, 1, 1), (0, 4, 4), (3, 8, 1)])
@pytest.mark.parametrize("channels", [16, 19])
def test_the_product_is_that_of_the_convolution_in_its_memory_format(layout, stride, size, channels):
    torch.manual_seed(0)
    conv = convolution(channels, 24, stride=stride)
    layer = SparseConv2d.from_conv(conv, "2:4")
    x = LAYOUTS[layout](torch.randn(size[0], channels, *size[1:]))
    want = conv(x)
    y = layer(x)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
    assert y.stride() == want.stride()


@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_convolution_in_channels_last_gives_channels_last(weight_last, layout):
    conv = convolution(stride=2)
    if weight_last:
        conv = conv.to(memory_format=torch.channels_last)
    layer = SparseConv2d.from_conv(conv, "2:4")
    x = LAYOUTS[layout](torch.randn(2, 16, 6, 5))
    assert layer(x).stride() == conv(x).stride()
    assert layer.to_conv().weight.stride() == conv.weight.stride()


@pytest.mark.parametrize("stride", [1, 2])
def test_one_image_without_a_batch(stride):
    conv = convolution(stride=stride)
    layer, x = SparseConv2d.from_conv(conv, "2:4"), torch.randn(16, 6, 5)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-5, atol=1e-5)
    assert layer(x).stride() == conv(x).stride()


@pytest.mark.parametrize("pattern", ["2:4", "8:16", "8:2:8", "block8x8:0.5", "2:4@t", "8:16+int8", "8:16+int8@a8"])
def test_every_packed_pattern(pattern):
    torch.manual_seed(0)
    conv = convolution(32, 16, pattern.partition("+")[0])
    layer, x = SparseConv2d.from_conv(conv, pattern), torch.randn(2, 32, 5, 4)
    near = 0.03 if "int8" in pattern else 1e-5
    with torch.no_grad():
        assert float((layer(x) - conv(x)).norm() / conv(x).norm()) < near


def test_gradients_reach_the_input_and_the_bias():
    conv = convolution(stride=2)
    layer = SparseConv2d.from_conv(conv, "2:4")
    given = [torch.randn(2, 16, 5, 4, requires_grad=True) for _ in range(2)]
    given[1].data.copy_(given[0].data)
    upstream = torch.randn(2, 24, 3, 2)
    conv.weight.requires_grad_(False)
    for module, x in zip((layer, conv), given, strict=True):
        module(x).backward(upstream)
    torch.testing.assert_close(given[0].grad, given[1].grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.bias.grad, conv.bias.grad)


def test_the_way_back_is_exact_and_hooks_go_along():
    conv = convolution(stride=(2, 1), bias=False).eval()
    conv.note = "kept"
    layer = SparseConv2d.from_conv(conv, "2:4")
    assert (layer.stride, layer.in_channels, layer.out_channels, layer.kernel_size) == ((2, 1), 16, 24, (1, 1))
    assert layer.note == "kept"
    back = layer.to_conv()
    assert type(back) is nn.Conv2d
    assert torch.equal(back.weight, conv.weight)
    assert (back.stride, back.bias, back.training, back.note) == ((2, 1), None, False, "kept")
    with pytest.raises(ModelError, match=r"use to_conv\(\)"):
        layer.to_linear()
    layer.activation = "relu"
    with pytest.raises(ModelError, match=r"this layer applies relu, which nn\.Conv2d cannot"):
        layer.to_conv()


def test_copies_and_pickles_and_states_are_the_same_layer():
    conv = convolution(stride=2).to(memory_format=torch.channels_last)
    layer, x = SparseConv2d.from_conv(conv, "2:4"), torch.randn(2, 16, 5, 4)
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(stream, weights_only=False)]
    fresh = SparseConv2d(16, 24, "2:4", stride=2).read_as(conv)
    fresh.load_state_dict(layer.state_dict())
    for each in (*copies, fresh):
        assert torch.equal(each(x), layer(x))
        assert each(x).stride() == layer(x).stride()
        assert each.stride == (2, 2)
    assert layer.half()(x.half()).dtype == torch.float16
    assert set(layer.state_dict()) == {"values", "metadata", "bias"}


def test_compilers_see_it():
    layer, x = SparseConv2d.from_conv(convolution(stride=2), "2:4"), torch.randn(2, 16, 5, 4)
    program = torch.export.export(nn.Sequential(layer), (x,))
    torch.testing.assert_close(program.module()(x), layer(x))
    traced = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(x), layer(x))
    torch.testing.assert_close(torch.func.vmap(layer)(x[None].expand(3, -1, -1, -1, -1))[2], layer(x))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        (lambda: nn.Conv2d(4, 4, 3), "takes a convolution of 1x1 in one group without padding"),
        (lambda: nn.Conv2d(4, 4, 1, padding=1), r"padding=\(1, 1\); others stay dense"),
        (lambda: nn.Conv2d(4, 4, 1, groups=2), "groups=2"),
        (lambda: nn.Linear(4, 4), "from_conv takes an nn.Conv2d, got Linear"),
        (lambda: nn.Conv2d(4, 4, 1).double(), "float64, which has no sparse kernel"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), "computed by a parametrization"),
    ],
)
def test_other_layers_are_refused(conv, message):
    with pytest.raises(ModelError, match=message):
        SparseConv2d.from_conv(conv(), "2:4")


def test_bad_input_is_one_sentence():
    layer = SparseConv2d(16, 8)
    for shape in ((2, 15, 4, 4), (16, 4), (1, 2, 16, 4, 4)):
        with pytest.raises(ModelError, match=r"this layer takes \[B, 16, H, W\] or \[16, H, W\]"):
            layer(torch.randn(shape))
    with pytest.raises(ModelError, match="input is a list"):
        layer([1.0])
    with pytest.raises(ModelError, match="stride=0 is none"):
        SparseConv2d(16, 8, stride=0)
    with pytest.raises(PatternError):
        SparseConv2d.from_conv(nn.Conv2d(16, 8, 1), "2:4")


def test_pruned_on_the_way_with_a_gram():
    torch.manual_seed(0)
    conv, x = nn.Conv2d(16, 8, 1, stride=2), torch.randn(4, 16, 9, 9)
    gram = sc.calibrate(nn.Sequential(conv), [x], show_progress=False)["0"].gram
    layer = SparseConv2d.from_conv(conv, "2:4", method="fast", gram=gram)
    plain = SparseConv2d.from_conv(conv, "2:4", method="magnitude")
    with torch.no_grad():
        assert float((layer(x) - conv(x)).norm()) < float((plain(x) - conv(x)).norm())


@pytest.mark.parametrize("stride", [0, -1, 1.5, (1.5, 2), (1, 2, 3), "ab", None])
def test_a_stride_that_is_none_is_refused(stride):
    with pytest.raises(ModelError, match="allowed are one or two numbers of at least 1"):
        sc.SparseConv2d(16, 8, "2:4", stride=stride)
