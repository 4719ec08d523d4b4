import pytest
import torch
from torch import nn

from sparsecomp.errors import ModelError
from sparsecomp.models.layers import find_layers, find_linears
from tests.models.test_layers import Conv1D


class TwiceConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def matrix_twin(stored):
    """[out, in, kh, kw] -> [out, kh*kw*in], entry by entry."""
    out, channels, height, width = stored.shape
    matrix = torch.zeros(out, height * width * channels, dtype=stored.dtype)
    for row in range(out):
        for y in range(height):
            for x in range(width):
                for channel in range(channels):
                    matrix[row, (y * width + x) * channels + channel] = stored[row, channel, y, x]
    return matrix


@pytest.mark.parametrize("shape", [(5, 7, 3, 2), (4, 8, 1, 1), (1, 1, 2, 5), (3, 4, 1, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_is_a_matrix_with_the_channels_of_each_kernel_position_side_by_side(shape, channels_last):
    out, channels, *kernel = shape
    conv = nn.Conv2d(channels, out, kernel)
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    layer = find_layers(nn.Sequential(conv))["0"]
    assert (layer.kind, layer.shape, layer.channels) == ("conv2d", (out, kernel[0] * kernel[1] * channels), channels)
    want = matrix_twin(conv.weight.detach())
    assert torch.equal(layer.get_weight(), want)
    assert torch.equal(layer.from_matrix(want), conv.weight)
    mask = torch.rand(shape) < 0.5
    assert torch.equal(layer.from_matrix(layer.to_matrix(mask)), mask)
    assert layer.to_matrix(mask).dtype == torch.bool
    parameter, strides, new = conv.weight, conv.weight.stride(), torch.randn(layer.shape)
    layer.set_weight(new)
    assert conv.weight is parameter
    assert parameter.stride() == strides
    assert torch.equal(matrix_twin(parameter.detach()), new)


def test_to_matrix_and_from_matrix_of_every_kind_are_each_others_way_back():
    model = nn.Sequential(nn.Linear(6, 4), Conv1D(4, 6), nn.Conv2d(3, 4, (1, 2)))
    for layer in find_layers(model).values():
        stored = torch.randn(layer.parameter.shape)
        matrix = layer.to_matrix(stored)
        assert matrix.shape == layer.shape == (4, 6)
        assert torch.equal(layer.from_matrix(matrix), stored)
        with pytest.raises(ModelError, match=r"got a tensor of shape \(9, 9\); the layer stores its weight as"):
            layer.to_matrix(torch.zeros(9, 9))
        with pytest.raises(ModelError, match=r"got a matrix of shape \(9, 9\); the layer takes .out, in. = \(4, 6\)"):
            layer.from_matrix(torch.zeros(9, 9))


def test_linears_are_what_can_run_sparse_and_layers_are_what_can_be_pruned():
    model = nn.Sequential(
        *(nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 1, stride=2), nn.Conv2d(8, 8, 1, padding="same")),
        *(nn.Conv2d(8, 8, (1, 2)), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 8, 1, padding=(0, 1))),
        *(nn.Conv2d(8, 8, 3, padding_mode="reflect", padding=1), TwiceConv(4, 4, 1), nn.Linear(8, 4)),
    )
    table = find_layers(model)
    assert list(table) == ["0", "1", "2", "3", "5", "6", "8"]
    assert "a convolution in groups (groups=2) stays dense" in table.skipped["4"]
    assert "TwiceConv has a forward of its own" in table.skipped["7"]
    runnable = find_linears(model)
    assert list(runnable) == ["1", "2", "8"]
    assert set(runnable.skipped) == set("034567")
    assert list(find_layers(model, only="0")) == ["0"]


def test_a_1x1_convolution_is_a_linear_on_the_same_memory():
    conv = nn.Conv2d(6, 4, 1, stride=2)
    linear = find_layers(nn.Sequential(conv))["0"].as_linear()
    assert linear.weight.data_ptr() == conv.weight.data_ptr()
    assert linear.bias is conv.bias
    x = torch.randn(2, 6, 5, 7)
    torch.testing.assert_close(linear(x[..., ::2, ::2].movedim(1, -1)).movedim(-1, 1), conv(x))
